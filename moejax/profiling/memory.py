"""What a compiled train step takes memory for, at its peak and over its schedule. Nothing is run.

    compiled, assignment = compile_with_buffers(train_step.lower())
    memory = StepMemory.of(compiled, assignment)
    memory.peak_bytes, memory.by_group(), memory.at_peak()[:20]

The sum of what is live at the peak is XLA's own `peak_memory_in_bytes`, to the byte, for H100 and TPU v5p
(`moe_16x10b`, 64 × 1,024: 17,393,282,758 and 16,919,996,768). On CPU that figure leaves temporaries out, but there
arguments, outputs, constants and the heap of temporaries add up to this sum and the heap's holes.

Two questions are asked of each temporary. Which phase made it: the first of its values whose instruction has one, see
`moejax.profiling.phases`, else the nearest instruction that feeds it. A sum of gradients over microbatches belongs to
`pipeline` that way, for the schedule sums them up. And what is in it, by shape: what has a weight's dims (in any order,
gathered or as stored, of all layers or of one) is a gradient if it is float32 of the backward pass and neither gathered
nor cut out of a stack, else a copy of the weight; other stacks that a loop of the forward pass fills are saved
activations. An activation counts as a weight if it happens to have its dims, in a phase that uses that weight.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import numpy as np

from moejax import hlo
from moejax.hlo import COLLECTIVES, Instruction, Module
from moejax.profiling.buffers import Assignment, Block, Value
from moejax.profiling.phases import PHASES, UNNAMED, Op, ops, scope_path
from moejax.sharding import STACK_DIMS
from moejax.train.memory_guard import MemoryUse

ARGUMENTS = ("parameters", "moments", "batch", "balancer", "other arguments")
WHOLE_TIME = (*ARGUMENTS, "outputs", "constants")
GROUPS = (*WHOLE_TIME, *PHASES, UNNAMED)
CONTENTS = (*WHOLE_TIME, "gradients", "copies of weights", "saved activations", "working memory")

_NAMES = {"group": GROUPS, "content": CONTENTS}
_ARGUMENT_OF = (
    (r"state\.params\b", "parameters"),
    (r"state\.opt_state\b", "moments"),
    (r"state\.balance\b", "balancer"),
    (r"batch\b", "batch"),
)
_WORDS = {"convert_element_type": "cast", "add_any": "sum"} | dict.fromkeys(
    ("closed_call", "while", "body", "checkpoint", "remat2", "shard_map"), ""
)
_USED_IN = {  # by how a weight's name begins: phases that may have something of its shape; others may have any
    "attention": ("attention",),
    "moe.w_router": ("route",),
    "moe.experts": ("expert",),
    "embed": ("embed", "logits"),  # tied
    "head": ("logits", "loss"),
}
_USED_ANYWHERE = ("pipeline", "gather", "optimizer", UNNAMED)


@dataclasses.dataclass(frozen=True)
class Buffer:
    """A place in memory. `live` are ranges of moments, from the first to before the last."""

    num_bytes: int
    group: str  # one of GROUPS
    content: str  # one of CONTENTS
    backward: bool
    name: str  # the argument's, else that of the instruction that makes it
    shape: str
    words: str
    live: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class StepMemory:
    """The memory that one device takes for one run of a program.

    Attributes:
      buffers: all there are.
      moments: (computation, instruction) of the schedule, see `Assignment`.
      running: by moment, the phase of what runs then (of GROUPS) and whether it is of the backward pass.
      peak: the moment at which most is live, the first of them.
      heap_bytes: that XLA lays temporaries out in: those of the peak, and holes between them.
      reported: XLA's figures.
      platform: "cpu", "gpu" or "tpu".
    """

    buffers: tuple[Buffer, ...]
    moments: tuple[tuple[str, str], ...]
    running: tuple[tuple[str, bool], ...]
    peak: int
    heap_bytes: int
    reported: MemoryUse
    platform: str

    @classmethod
    def of(cls, compiled: Any, assignment: Assignment) -> StepMemory:
        """Reads a compiled program, of `TrainStep.lower` or any other; arguments of others have no categories."""
        module = hlo.parse(compiled.as_text())
        reader = _Reader(module)
        buffers = tuple(reader.buffer(block) for block in assignment.blocks)
        running = tuple(reader.origin([instruction]) for _, instruction in assignment.moments)
        peak = int(_live(buffers, len(assignment.moments)).argmax())
        reported, platform = MemoryUse.of(compiled), _platform(compiled)
        return cls(buffers, assignment.moments, running, peak, assignment.heap_bytes, reported, platform)

    def at_peak(self) -> list[Buffer]:
        """What is live at the peak, the largest first."""
        live = [b for b in self.buffers if any(first <= self.peak < end for first, end in b.live)]
        return sorted(live, key=lambda b: (-b.num_bytes, b.name))

    @property
    def peak_bytes(self) -> int:
        """Of all that is live at the peak."""
        return sum(b.num_bytes for b in self.at_peak())

    @property
    def reported_bytes(self) -> int:
        """What `peak_bytes` must come to by XLA's own count: its peak, on CPU what it allocates less the holes."""
        if self.platform != "cpu":
            return self.reported.peak
        constants = sum(b.num_bytes for b in self.buffers if b.group == "constants")
        return self.reported.arguments + self.reported.outputs + self.reported.temporaries + constants - self.hole_bytes

    @property
    def hole_bytes(self) -> int:
        """Of the heap of temporaries, what is not in use at the peak: alignment, and places that fit nothing."""
        return self.heap_bytes - sum(b.num_bytes for b in self.at_peak() if b.group not in WHOLE_TIME)

    @property
    def total_bytes(self) -> int:
        """What a device must have: all that is live at the peak, and holes."""
        return self.peak_bytes + self.hole_bytes

    def by_group(self) -> dict[str, tuple[int, int]]:
        """Bytes at the peak, and those of them that the backward pass has made, by GROUPS; what is none is absent."""
        return self._sums("group")

    def by_content(self) -> dict[str, tuple[int, int]]:
        """As `by_group`, by CONTENTS."""
        return self._sums("content")

    def _sums(self, field: Literal["group", "content"]) -> dict[str, tuple[int, int]]:
        found = {name: [b for b in self.at_peak() if getattr(b, field) == name] for name in _NAMES[field]}
        return {
            name: (sum(b.num_bytes for b in bs), sum(b.num_bytes for b in bs if b.backward))
            for name, bs in found.items()
            if bs
        }

    def over_schedule(self, field: Literal["group", "content"] = "group") -> dict[str, np.ndarray]:
        """Bytes live at each moment, int64 [moments], by GROUPS or by CONTENTS; what is none throughout is absent."""
        found = {name: [b for b in self.buffers if getattr(b, field) == name] for name in _NAMES[field]}
        return {name: _live(buffers, len(self.moments)) for name, buffers in found.items() if buffers}


def _live(buffers: Sequence[Buffer], num_moments: int) -> np.ndarray:
    """Bytes live at each moment, int64; one moment if there is none."""
    change = np.zeros(max(num_moments, 1) + 1, np.int64)
    for buffer in buffers:
        for first, end in buffer.live:
            change[first] += buffer.num_bytes
            change[end] -= buffer.num_bytes
    return change.cumsum()[:-1]


def _platform(compiled: Any) -> str:
    sharding = jax.tree.leaves((compiled.input_shardings, compiled.output_shardings))[0]
    return next(iter(sharding.device_set)).platform


class _Reader:
    """Finds out what blocks are, from the text of the program."""

    def __init__(self, module: Module) -> None:
        self.module = module
        self.ops: dict[str, Op] = ops(module)
        self.where = {name: (c, x) for c, xs in module.computations.items() for name, x in xs.items()}
        entry = module.computations[module.entry].values()
        self.parameters = {int(x.operands[0]): x for x in entry if x.opcode == "parameter"}
        self.weights = _weight_shapes(self.parameters.values())

    def buffer(self, block: Block) -> Buffer:
        if block.parameter is not None:
            return self._argument(block, block.parameter)
        first = block.values[0]
        shape, name = f"{first.dtype}{list(first.dims)}".replace(" ", ""), first.instruction
        if block.kind != "temporary":
            group = f"{block.kind}s"
            return Buffer(block.num_bytes, group, group, False, name, shape, "", block.live)
        group, backward = self.origin([value.instruction for value in block.values])
        how, like = self._how(block, first), self._like(first, group)
        content = _content(first, how, like, backward)
        words = ", ".join(filter(None, (how, like)))
        return Buffer(block.num_bytes, group, content, backward, name, shape, words, block.live)

    def _argument(self, block: Block, number: int) -> Buffer:
        x = self.parameters[number]
        path = _path(x)
        group = next((g for pattern, g in _ARGUMENT_OF if re.match(pattern, path)), "other arguments")
        shape = re.sub(r"\{.*", "", x.shape).strip()
        return Buffer(block.num_bytes, group, group, False, path or x.name, shape, "argument", block.live)

    def origin(self, names: Sequence[str]) -> tuple[str, bool]:
        """Phase and pass of the first of these instructions that has a phase."""
        known = [self.ops[name] for name in names if name in self.ops]
        op = next((op for op in known if op.phase), known[0] if known else None)
        return (op.phase or UNNAMED, op.backward) if op else (UNNAMED, False)

    def _how(self, block: Block, first: Value) -> str:
        """In which way the values come about, in words."""
        found = [self.where[v.instruction] for v in block.values if v.instruction in self.where]
        loops = [x for _, x in found if x.opcode == "while"]
        if loops:
            turns = [self.module.trip_count(x) for x in loops]
            stacked = any("dynamic_update_slice" in scope_path(x) or _is(x, "dynamic-update-slice") for _, x in found)
            counts = [n for n in turns if n in first.dims] if stacked else turns
            words = "stacked by a loop" if stacked else "kept through a loop"
            return f"{words} of {counts[0]} turns" if counts and counts[0] else words
        return self._operation(*found[0]) if found else ""

    def _operation(self, computation: str, x: Instruction) -> str:
        last = scope_path(x).rsplit("/", 1)[-1]
        if self.ops[x.name].communication:
            inside = [i.opcode for name in x.called for i in self.module.computations.get(name, {}).values()]
            names = (opcode.removesuffix("-start").removesuffix("-done") for opcode in (x.opcode, *inside))
            return f"result of {next(name for name in names if name in COLLECTIVES)}"
        if self.module.flops(computation, x):
            return "matrix product"
        if last == "dynamic_slice" or _is(x, "dynamic-slice"):
            return "cut out of a stack"
        for opcode, words in (("transpose", "transposed"), ("broadcast", "filled with one value")):
            if _is(x, opcode):
                return words
        if x.opcode in ("copy", "copy-start") or "[" in last:  # a parameter's path has brackets
            return "copied"
        return _WORDS.get(last, last.replace("_", " "))

    def _like(self, value: Value, phase: str) -> str:
        """The weight with these dims, in words; of several that which has them in this order, then as it is stored."""
        dims = _without_ones(value.dims)
        same = [w for w in self.weights if sorted(w.dims) == sorted(dims) and w.may_be_in(phase)]
        same = same if len(dims) > 1 else []
        ranks = [(w.dims != dims, w.gathered) for w in same]
        best = dict.fromkeys(w.words for w, rank in zip(same, ranks, strict=True) if rank == min(ranks))
        return f"like {' or '.join(itertools.islice(best, 2))}" if best else ""


def _content(first: Value, how: str, like: str, backward: bool) -> str:
    if like:
        summed = backward and first.dtype == "f32" and how != "cut out of a stack" and "all-gather" not in how
        return "gradients" if summed else "copies of weights"
    return "saved activations" if how.startswith("stacked") and not backward else "working memory"


@dataclasses.dataclass(frozen=True)
class _Weight:
    """A form that a weight may have, without dims of 1."""

    dims: tuple[int, ...]
    gathered: bool
    words: str

    def may_be_in(self, phase: str) -> bool:
        known = [phases for begin, phases in _USED_IN.items() if self.words.startswith(begin)]
        return not known or phase in (*known[0], *_USED_ANYWHERE)


def _weight_shapes(parameters: Iterable[Instruction]) -> list[_Weight]:
    """Every weight: as stored or gathered along any of its dims, of all layers or of one."""
    found = []
    for x in parameters:
        path = _path(x)
        if not path.startswith("state.params"):
            continue
        kind, *rest = re.findall(r"\['(\w+)'\]", path)
        stacked = STACK_DIMS.get(kind, 0)  # dims before a layer's own
        name = ".".join(rest if kind == "layers" else [kind, *rest])
        (stored,), tiles = x.arrays, re.search(r"sharding=\{devices=\[([\d,]+)\]", x.attributes)
        counts = [int(n) for n in tiles[1].split(",")] if tiles else [1] * len(stored)
        for times in itertools.product(*({1, n} for n in counts[: len(stored)])):
            dims = [dim * n for dim, n in zip(stored, times, strict=True)]
            whole = math.prod(times) > 1
            found.append(_Weight(_without_ones(dims), whole, name + " (gathered)" * whole))
            if math.prod(stored[:stacked]) > 1:
                words = f"{name} ({'gathered, ' * whole}one layer)"
                found.append(_Weight(_without_ones(dims[stacked:]), whole, words))
    return found


def _without_ones(dims: Sequence[int]) -> tuple[int, ...]:
    return tuple(dim for dim in dims if dim > 1)


def _is(x: Instruction, opcode: str) -> bool:
    """Whether it is that operation, or a fusion that XLA names after it."""
    return x.opcode == opcode or (x.opcode == "fusion" and opcode in x.name.replace("_", "-"))


def _path(parameter: Instruction) -> str:
    """The argument that a parameter of the program is, `state.params['embed']['table_VD']`."""
    return scope_path(parameter).replace("\\'", "'")
