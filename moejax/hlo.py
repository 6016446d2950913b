"""A compiled program as XLA prints it (`compiled.as_text()`), read back: instructions, loops, FLOPs, bytes.

Only what is needed to measure a program: instructions in the order in which they are printed, which is the order of
execution in a scheduled module; how often each computation runs; the FLOPs of its matrix products; what its collectives
send. Works on the text of the CPU, GPU and TPU compilers alike.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable

COLLECTIVES = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter", "all-reduce", "collective-permute")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.-]+) (?:\([^\n]*\) -> [^\n]*)?\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%?([\w.-]+) = ")
_OPCODE = re.compile(r" ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"\b(pred|token|[a-z]+(\d+)\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.-]+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`. `shape` and `attributes` are text."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    @property
    def arrays(self) -> list[tuple[int, ...]]:
        """The dims of the result, or of each part of a tuple."""
        return [tuple(map(int, filter(None, dims.split(",")))) for _, _, dims in _ARRAY.findall(self.shape)]

    @property
    def num_bytes(self) -> int:
        """Bytes of the result, of all parts of a tuple together; layouts' padding is not counted."""
        sizes = (int(bits) if bits else {"pred": 8}.get(dtype, 0) for dtype, bits, _ in _ARRAY.findall(self.shape))
        return sum(bits * math.prod(dims) for bits, dims in zip(sizes, self.arrays, strict=True)) // 8

    @property
    def called(self) -> tuple[str, ...]:
        """The computations it calls; of a loop the body, not the condition."""
        return tuple(name.strip(" {}%") for names in _CALLED.findall(self.attributes) for name in names.split(","))

    def ints(self, name: str) -> list[int]:
        """The integers of the attribute `name={1,2}`; none if it is absent."""
        found = re.search(rf"\b{name}=\{{([\d,]*)\}}", self.attributes)
        return [int(x) for x in found[1].split(",") if x] if found else []


@dataclasses.dataclass(frozen=True)
class Module:
    """Computation -> its instructions by name, in order; the name of the one that is run; FLOPs of a custom call."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    kernel_flops: Callable[[Instruction], float] = lambda call: 0

    @functools.cached_property
    def _flops(self) -> dict[str, float]:
        return {}

    def computation_flops(self, name: str) -> float:
        """FLOPs of the matrix products of one run of a computation, of those that it calls as well."""
        if name not in self._flops:
            self._flops[name] = sum(self.flops(name, x) for x in self.computations[name].values())
        return self._flops[name]

    def flops(self, computation: str, instruction: Instruction) -> float:
        """FLOPs of the matrix products of one run of an instruction; 2 for a multiplication and an addition.

        Counts dots, convolutions (a TPU's form of a dot), cuBLAS calls, and these inside fusions, calls and loops.
        A Pallas kernel is opaque; `kernel_flops` says what its custom call does.
        """
        x = instruction
        if x.opcode == "dot":
            return self._dot_flops(computation, x, x.ints("lhs_contracting_dims"))
        if x.opcode == "convolution":
            return self._convolution_flops(computation, x)
        if x.opcode == "custom-call":
            return self._library_flops(computation, x)
        if x.opcode == "while":
            return self.trip_count(x) * sum(self.computation_flops(name) for name in x.called)
        if x.opcode == "conditional":
            return max(self.computation_flops(name) for name in x.called)
        if x.opcode in ("fusion", "call", "call-start", "async-start"):
            return sum(self.computation_flops(name) for name in x.called)
        return 0

    def trip_count(self, loop: Instruction) -> int:
        """How often a `while` runs its body; 0 where that depends on data, as for further rounds of a dispatch.

        GPU and CPU compilers write it down. Of a TPU's loop the condition is read, `counter < constant`, with a counter
        from 0 in steps of 1, as those of `lax.scan` are.
        """
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations[_search(r"condition=%?([\w.-]+)", loop.attributes)[1]]
        *_, root = condition.values()
        limit = condition.get(root.operands[-1]) if "direction=LT" in root.attributes else None
        return int(limit.operands[0]) if limit and limit.opcode == "constant" else 0

    def _dot_flops(self, computation: str, dot: Instruction, contracting: list[int]) -> float:
        (lhs,) = self.computations[computation][dot.operands[0]].arrays
        return 2.0 * math.prod(dot.arrays[0]) * math.prod(lhs[i] for i in contracting)

    def _library_flops(self, computation: str, call: Instruction) -> float:
        if 'custom_call_target="__cublas$' not in call.attributes:
            return self.kernel_flops(call)
        dims = _search(r'"lhs_contracting_dimensions":(\[[^]]*\])', call.attributes)
        return self._dot_flops(computation, call, [int(i) for i in json.loads(dims[1])])

    def _convolution_flops(self, computation: str, x: Instruction) -> float:
        """Counts the products with what is neither padding nor a hole of a dilation, as XLA's own analysis does."""
        lhs, rhs, out = (*(self.computations[computation][o].arrays[0] for o in x.operands), x.arrays[0])
        lhs_dims, rhs_dims, out_dims = _search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.attributes).groups()
        window = re.search(r"window=\{([^}]*)\}", x.attributes)
        fields = dict(field.split("=") for field in window[1].split()) if window else {}
        num_spatial = len(lhs_dims) - 2

        def each(name: str, default: str) -> list[str]:
            return fields[name].split("x") if name in fields else [default] * num_spatial

        products = out[out_dims.index("b")] * out[out_dims.index("f")] * rhs[rhs_dims.index("i")]
        strides, pads = each("stride", "1"), each("pad", "0_0")
        lhs_dilations, rhs_dilations = each("lhs_dilate", "1"), each("rhs_dilate", "1")
        for i in range(num_spatial):
            size_in, size_window, size_out = (
                dims[labels.index(str(i))] for dims, labels in ((lhs, lhs_dims), (rhs, rhs_dims), (out, out_dims))
            )
            dilation, first = int(lhs_dilations[i]), -int(pads[i].split("_")[0])
            steps = itertools.product(range(size_out), range(size_window))
            places = (first + o * int(strides[i]) + w * int(rhs_dilations[i]) for o, w in steps)
            products *= sum(p % dilation == 0 and 0 <= p < size_in * dilation for p in places)
        return 2.0 * products


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective: its kind, one of `COLLECTIVES`, and the bytes that each device sends to others, as a ring would."""

    kind: str
    sent_bytes: float
    asynchronous: bool  # starts here and ends at an instruction of its own


def collective(module: Module, computation: str, x: Instruction) -> Collective | None:
    """What `x` is if it runs or starts a collective, else None.

    An asynchronous one is `all-to-all-start`, or an `async-start` that wraps an `all-to-all`; GPU compilers mark those
    that they will run synchronously all the same.
    """
    asynchronous = x.opcode.endswith("-start") and '"is_sync":true' not in x.attributes
    inner = x
    if x.opcode == "async-start":
        (computation,) = x.called
        inner = next(i for i in module.computations[computation].values() if i.opcode != "parameter")
    kind = inner.opcode.removesuffix("-start")
    if kind not in COLLECTIVES:
        return None
    operands = sum(module.computations[computation][name].num_bytes for name in inner.operands)
    others = _group_size(inner) - 1
    factor = {
        "all-gather": others,
        "all-reduce": 2 * others / (others + 1),
        "collective-permute": _leaves_the_device(inner),
    }.get(kind, others / (others + 1))
    return Collective(kind, operands * factor, asynchronous)


def _leaves_the_device(permute: Instruction) -> bool:
    """Whether a permutation sends anything: over an axis of one device it hands every device its own."""
    pairs = re.search(r"source_target_pairs=\{(.*?\})\}", permute.attributes)
    return pairs is None or any(a != b for a, b in re.findall(r"\{(\d+),(\d+)\}", pairs[1]))


def _group_size(x: Instruction) -> int:
    """The number of devices that take part, from `{{0,1},{2,3}}`, `[8,2]<=[16]` or `mesh['a'=8,'b'=2] {'b'}`."""
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", x.attributes):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", x.attributes):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^]]*)\].*?\{([^}]*)\}", x.attributes):
        sizes = dict(axis.split("=") for axis in found[1].split(","))
        return math.prod(int(sizes[axis]) for axis in found[2].split(","))
    return 1 if x.opcode.startswith("collective-permute") else _unknown_groups(x)


def _unknown_groups(x: Instruction) -> int:
    raise ValueError(f"{x.name} has replica groups of an unknown form: {x.attributes[:200]}")


def parse(text: str, kernel_flops: Callable[[Instruction], float] = lambda call: 0) -> Module:
    """Reads the text of a scheduled module. `kernel_flops` says what the custom calls of kernels compute.

    Raises:
      ValueError: the instructions are not in the order of execution (no `is_scheduled=true`).
    """
    if "is_scheduled=true" not in text[: text.find("\n")]:
        raise ValueError("the module is not scheduled; use the text of a compiled program, compiled.as_text()")
    computations: dict[str, dict[str, Instruction]] = {}
    entry, name = "", None
    lines: list[str] = []
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        if name is None:
            if header := _HEADER.match(line):
                name, lines = header[2], []
                entry = name if header[1] else entry
        elif line == "}" or line.startswith("}, "):
            computations[name], name = _instructions(lines), None
        elif _INSTRUCTION.match(line):
            lines.append(line)
        else:  # a string of several lines in the attributes
            lines[-1] += line
    return Module(computations, entry, kernel_flops)


def _instructions(lines: list[str]) -> dict[str, Instruction]:
    found = (_instruction(line) for line in lines)
    return {x.name: x for x in found}


def _instruction(line: str) -> Instruction:
    head = _search(_INSTRUCTION, line)
    opcode = _search(_OPCODE, line, head.end() - 1)
    end = _closing(line, opcode.end() - 1)
    operands = line[opcode.end() : end]
    # Older compilers print the operand's shape before its name.
    names = re.findall(r"%([\w.-]+)", operands) or [x.strip() for x in operands.split(",") if x.strip()]
    return Instruction(head[1], line[head.end() : opcode.start()], opcode[1], tuple(names), line[end + 1 :])


def _search(pattern: str | re.Pattern[str], text: str, start: int = 0) -> re.Match[str]:
    """Finds a part that the text of every such instruction has."""
    found = re.compile(pattern).search(text, start)
    if found is None:
        raise ValueError(f"no {pattern!r} in {text[:200]}")
    return found


def _closing(line: str, at: int) -> int:
    """The place of the bracket that closes the one at `at`."""
    depth = 0
    for place in range(at, len(line)):
        depth += {"(": 1, ")": -1}.get(line[place], 0)
        if not depth:
            return place
    raise ValueError(f"unbalanced brackets: {line[:200]}")
