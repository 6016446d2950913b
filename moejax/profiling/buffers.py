"""XLA's buffer assignment: which values of a compiled program share a place in memory, and when each place is in use.

    compiled, assignment = compile_with_buffers(train_step.lower(batch_size, seq_len))

The compilers for CPUs, GPUs and TPUs all write it where they are told to dump what they compile, as an `HloProto`
(xla/service/hlo.proto). `compiled.memory_analysis().serialized_buffer_assignment_proto` would spare the files, but with
jax 0.10.2 it is empty for GPUs and TPUs compiled ahead of time, and on CPU it lacks the heap simulator's trace, which
says when memory is taken and given back. Of the protocol these fields are read, by number:

    HloProto                1 module, 3 buffer assignment
    HloModuleProto          3 computations
    HloComputationProto     2 instructions, 5 id
    HloInstructionProto     1 name, 2 opcode, 3 shape, 35 id, 38 ids of called computations
    ShapeProto              2 element type, 3 dims, 4 parts of a tuple
    BufferAssignmentProto   1 values, 3 allocations, 4 traces
    LogicalBufferProto      1 id, 2 size, 3 defined at: 3 index into the tuple, 4 instruction's id; 4 memory space
    BufferAllocationProto   2 size, 3 thread-local, 5 parameter of the program, 6 its number, 7 live at the end,
                            8 memory space, 9 values: 1 id; 12 constant
    HeapSimulatorTrace      1 events: 1 kind (0 taken, 1 given back, 2 shared with another value's), 2 value's id, 5 the
                            other value's id; 3 computation's name, 4 instruction's name
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.experimental.compilation_cache import compilation_cache

from moejax.profiling.wire import Fields, decode, integers

Kind = Literal["argument", "output", "constant", "temporary"]

_TAKEN, _SHARED = 0, 2
_TYPES = {
    1: "pred", 2: "s8", 3: "s16", 4: "s32", 5: "s64", 6: "u8", 7: "u16", 8: "u32", 9: "u64", 10: "f16", 11: "f32",
    12: "f64", 13: "tuple", 15: "c64", 16: "bf16", 17: "token", 18: "c128", 19: "f8e5m2", 20: "f8e4m3fn", 21: "s4",
    22: "u4",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Value:
    """What an instruction makes, or a part of its tuple. Inside an asynchronous instruction it has that one's name."""

    instruction: str
    dtype: str  # as XLA writes it: "f32", "tuple"
    dims: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Block:
    """A place in memory that some values share: a loop's state, say, with what goes in and what comes out.

    `live` are ranges of moments, from the first to before the last: see `Assignment.moments`.
    """

    num_bytes: int
    kind: Kind
    values: tuple[Value, ...]  # in the order in which they are made
    live: tuple[tuple[int, int], ...]
    parameter: int | None = None  # of the program, for an argument


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The memory of a device that one run of the program takes.

    Attributes:
      blocks: all there are; what is no temporary is live at every moment.
      moments: (computation, instruction) for each time that temporary memory is taken, shared or given back, in the
        order of the schedule; a loop's body is there once.
      heap_bytes: of temporaries as they are laid out: those live at the peak, and holes between them.
    """

    blocks: tuple[Block, ...]
    moments: tuple[tuple[str, str], ...]
    heap_bytes: int


def compile_with_buffers(lowered: Any, compiler_options: dict[str, Any] | None = None) -> tuple[Any, Assignment]:
    """Compiles what `jax.jit(...).lower(...)` gives; also returns the buffer assignment.

    JAX's compilation cache is left out, for a program that comes from there is not dumped.
    """
    with tempfile.TemporaryDirectory() as folder, _without_cache():
        compiled = lowered.compile((compiler_options or {}) | {"xla_dump_to": folder, "xla_dump_hlo_as_proto": True})
        found = [path.read_bytes() for path in sorted(Path(folder).glob("*after_optimizations.hlo.pb"))]
    if not found:
        raise ValueError("the compiler has dumped no program: is XLA_FLAGS set to dump somewhere else?")
    return compiled, read(max(found, key=len))  # small programs, of constants, may be compiled on the way


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    enabled = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]  # options appear at run time
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()  # JAX asks only once whether there is one
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()


def read(hlo_proto: bytes) -> Assignment:
    """The buffer assignment of a serialized `HloProto`.

    A program has one heap of temporaries in the device's main memory, space 0; its trace is the longest there. Other
    allocations have a place of their own, all the time. A kernel's own memory (thread-local) and a TPU's memory on the
    chip (other spaces) are not counted.

    Raises:
      ValueError: there is no buffer assignment, or the message is none.
    """
    proto = decode(hlo_proto)
    if 1 not in proto or 3 not in proto:
        raise ValueError("the message has no module with a buffer assignment; give XLA's HloProto after optimizations")
    instructions = _instructions(decode(proto[1][0]))
    assignment = decode(proto[3][0])
    sizes, values = {}, {}
    for message in assignment[1]:
        fields = decode(message)
        if _number(fields, 4) == 0:
            key, place = _number(fields, 1), decode(fields[3][0])
            sizes[key] = _number(fields, 2)
            values[key] = _value(instructions, _number(place, 4), integers(place, 3))
    traces = [[decode(event) for event in decode(trace)[1]] for trace in assignment[4]]
    events = max((t for t in traces if t and _number(t[0], 2) in values), key=len, default=[])
    traced = {_number(event, 2) for event in events}
    blocks, heap_bytes = _replay(events, sizes, values), 0
    for message in assignment[3]:
        fields = decode(message)
        ids = [_number(decode(assigned), 1) for assigned in fields[9]]
        if not traced.isdisjoint(ids):
            heap_bytes += _number(fields, 2)
        elif not _number(fields, 3) and not _number(fields, 8):
            blocks.append(_whole(fields, [values[i] for i in ids], len(events)))
    moments = tuple((_text(event, 3), _text(event, 4)) for event in events)
    return Assignment(tuple(blocks), moments, heap_bytes)


def _replay(events: list[Fields], sizes: dict[int, int], values: dict[int, Value]) -> list[Block]:
    """The heap's blocks. A block is in use while any of its values is, be there pauses in between."""
    block_of: dict[int, int] = {}  # by value: the one whose memory was taken
    number: dict[int, int] = defaultdict(int)  # by block: values in use
    members: dict[int, list[Value]] = defaultdict(list)
    begun: dict[int, int] = {}
    live: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for moment, event in enumerate(events):
        kind, value = _number(event, 1), _number(event, 2)
        if kind in (_TAKEN, _SHARED):
            block = block_of[value] = value if kind == _TAKEN else block_of[_number(event, 5)]
            members[block].append(values[value])
            if not number[block]:
                begun[block] = moment
            number[block] += 1
        else:
            block = block_of[value]
            number[block] -= 1
            if not number[block]:
                live[block].append((begun.pop(block), moment))
    for block, first in begun.items():
        live[block].append((first, len(events)))
    return [Block(sizes[b], "temporary", tuple(members[b]), tuple(live[b])) for b in members]


def _whole(allocation: Fields, values: list[Value], num_moments: int) -> Block:
    """A block with an allocation of its own."""
    kinds: tuple[tuple[int, Kind], ...] = ((5, "argument"), (12, "constant"), (7, "output"))
    kind: Kind = next((name for number, name in kinds if _number(allocation, number)), "temporary")
    parameter = _number(allocation, 6) if kind == "argument" else None
    return Block(_number(allocation, 2), kind, tuple(values), ((0, max(num_moments, 1)),), parameter)


def _instructions(module: Fields) -> dict[int, tuple[str, Fields]]:
    """By id: the name, and the shape's message. What an async-start wraps, which texts do not always show, has its."""
    computations = [decode(message) for message in module[3]]
    inside = {_number(fields, 5): [decode(message) for message in fields[2]] for fields in computations}
    wrapper = {
        called: _text(x, 1)
        for xs in inside.values()
        for x in xs
        if _text(x, 2) == "async-start"
        for called in integers(x, 38)
    }
    return {
        _number(x, 35): (wrapper.get(computation, _text(x, 1)), decode(x[3][0]))
        for computation, xs in inside.items()
        for x in xs
    }


def _value(instructions: dict[int, tuple[str, Fields]], key: int, index: list[int]) -> Value:
    name, shape = instructions[key]
    for i in index:
        shape = decode(shape[4][i])
    element = _number(shape, 2)
    return Value(name, _TYPES.get(element, f"type{element}"), tuple(integers(shape, 3)))


def _number(fields: Fields, number: int) -> int:
    """An integer that is 0 where it is absent."""
    return fields[number][-1] if number in fields else 0


def _text(fields: Fields, number: int) -> str:
    return fields[number][-1].decode() if number in fields else ""
