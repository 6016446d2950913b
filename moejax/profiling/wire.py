"""Protocol buffers as bytes: enough of their wire format to read and to edit messages without their Python classes.

XLA writes traces and buffer assignments as protocol buffers whose classes come with TensorFlow. A message is a sequence
of fields: a key, which is the field's number and a wire type, then an integer of variable length (0), 8 bytes (1), a
length and as many bytes (2: text, messages, packed integers), or 4 bytes (5).
Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Fields = dict[int, list[Any]]  # number -> contents in order: integers, and bytes of what has a length

VARINT, BYTES = 0, 2  # wire types
_FIXED = {1: 8, 5: 4}  # wire type -> bytes


def walk(message: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Each field's number and wire type, and where it, its content and the next field begin.

    Raises:
      ValueError: it is no message.
    """
    at = 0
    while at < len(message):
        begin = at
        key, content = read_varint(message, at)
        wire = key & 7
        if wire == VARINT:
            _, at = read_varint(message, content)
        elif wire == BYTES:
            size, content = read_varint(message, content)
            at = content + size
        elif wire in _FIXED:
            at = content + _FIXED[wire]
        else:
            raise ValueError(f"byte {begin} of a message begins a field of wire type {wire}; it must be 0, 1, 2 or 5")
        yield key >> 3, wire, begin, content, at


def decode(message: bytes) -> Fields:
    """The fields of a message by number; see `walk` for errors."""
    found: Fields = defaultdict(list)
    for number, wire, _, content, end in walk(message):
        found[number].append(read_varint(message, content)[0] if wire == VARINT else message[content:end])
    return found


def integers(fields: Fields, number: int) -> list[int]:
    """A repeated integer: packed into bytes, as proto3 writes it, or one by one."""
    found: list[int] = []
    for item in fields.get(number, ()):
        if isinstance(item, int):
            found.append(item)
            continue
        at = 0
        while at < len(item):
            value, at = read_varint(item, at)
            found.append(value)
    return found


def read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The integer there, seven bits a byte, the least first, all bytes but the last with bit 7; and the place after."""
    value = shift = 0
    while message[at] & 0x80:
        value |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | message[at] << shift, at + 1


def varint(number: int) -> bytes:
    """An integer >= 0, as `read_varint` reads it."""
    found = bytearray()
    while number >= 0x80:
        found.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*found, number])


def field(number: int, content: bytes) -> bytes:
    """A field of that number with bytes."""
    return varint(number << 3 | BYTES) + varint(len(content)) + content
