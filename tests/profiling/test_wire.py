"""Messages as bytes: what is written is read, and what JAX's own classes wrote too."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.profiling.wire import decode, field, integers, read_varint, varint, walk


@given(st.integers(0, 2**64 - 1), st.binary(max_size=3))
def test_an_integer_is_read_as_it_was_written(number, after):
    found = varint(number)
    assert read_varint(found + after, 0) == (number, len(found))


@given(st.lists(st.tuples(st.integers(1, 5000), st.binary(max_size=200)), max_size=8))
def test_fields_are_read_as_they_were_written(fields):
    message = b"".join(field(number, content) for number, content in fields)
    found = decode(message)
    assert {n: found[n] for n in found} == {n: [c for m, c in fields if m == n] for n, _ in fields}
    ends = [end for *_, end in walk(message)]
    assert [begin for _, _, begin, _, _ in walk(message)] == [0, *ends][: len(ends)]


def test_a_message_that_was_written_by_its_class():
    """An XSpace: planes are field 1, their id 1, name 2 and lines 3; of a line the timestamp is 3."""
    text = 'planes { id: 300 name: "a" lines { timestamp_ns: 1795395493073339757 } lines { } }'
    (plane,) = decode(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text))[1]
    found = decode(plane)
    assert (found[1], found[2], len(found[3])) == ([300], [b"a"], 2)
    assert decode(found[3][0])[3] == [1795395493073339757]


def test_integers_packed_and_one_by_one():
    packed = field(3, b"".join(map(varint, (1, 300, 0))))
    assert integers(decode(packed), 3) == [1, 300, 0]
    assert integers(decode(varint(3 << 3) + varint(300) + varint(3 << 3) + varint(1)), 3) == [300, 1]
    assert integers(decode(packed), 4) == []


def test_numbers_of_fixed_size_are_bytes():
    assert decode(varint(2 << 3 | 1) + b"12345678" + varint(4 << 3 | 5) + b"1234") == {2: [b"12345678"], 4: [b"1234"]}


def test_what_is_no_message_is_refused():
    with pytest.raises(ValueError, match="byte 0 of a message begins a field of wire type 7; it must be 0, 1, 2 or 5"):
        decode(b"\x0f")
