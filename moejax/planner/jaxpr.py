"""Counts of one step on one device, read off its jaxpr. What is counted, and how:

- A scan's body counts as often as it runs, of a `cond` the costliest branch, and a `while` not at all: the only ones on
  accelerators are a dispatch's further rounds, which a balanced router does not need.
- FLOPs are those of matrix products: `dot_general` as its shapes say; grouped products as if every row of their
  operand were some expert's; attention kernels by their products of queries and keys, of which causality leaves half
  (`moejax.kernels.attention.cost`).
- Bytes sent are those of `moejax.planner.work.Collective`, at axes of more than one device, in the order of the mesh. A
  ragged exchange moves as many rows as both its ends have room for.
- Bytes moved are operands and results of every operation but reshapes and casts of type alone, which is more than a
  compiler that fuses them would move.
- An operation's phase is the innermost name of the vocabulary on its name stack. Its pass is named there too:
  `transpose` is backward, and `rematted_computation` inside of it is computed again.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args

import jax.numpy as jnp
from jax.extend import core

from moejax.kernels.attention import cost
from moejax.planner.work import Collective, Kind, Pass, Phase
from moejax.program import FORWARD_ONLY

KINDS: dict[str, Kind] = {
    "all_to_all": "all_to_all",
    "ragged_all_to_all": "all_to_all",
    "all_gather": "all_gather",
    "all_gather_invariant": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "psum": "all_reduce",
    "psum_invariant": "all_reduce",
    "pmax": "all_reduce",
    "ppermute": "ppermute",
}
_MOVES_NOTHING = frozenset(("pvary", "reshape", "squeeze", "expand_dims", "name", "stop_gradient", "axis_index"))
_PHASES = frozenset(get_args(Phase))
OTHER = "other"  # the phase of what stands in none
_WORD = re.compile(r"\w+")

K = TypeVar("K")

Tally = defaultdict[K, float]
TransferKey = tuple[str, str, str, tuple[str, ...]]  # phase, pass, kind, axes
StackKey = tuple[str, tuple[int, ...], str]  # name, shape, dtype


def _tally() -> Tally[Any]:
    return defaultdict(float)


@dataclasses.dataclass
class Counts:
    """What one device does in one step.

    Attributes:
      flops_by_pass: (phase, pass) -> FLOPs of matrix products.
      sent_by_pass: (phase, pass, kind, axes) -> bytes sent to other devices.
      operands_by_pass: the same keys -> bytes of the collectives' operands.
      moved_by_pass: (phase, pass) -> bytes read and written by every operation, as if none were fused.
      saved: (name, shape, dtype) -> bytes that the forward pass's outermost loops stack up, most of it for the backward
        pass; the name is a rematerialization policy's, or the operation's that made it. Of one accumulation slice.
      param_bytes: of the stored parameters.
    """

    flops_by_pass: Tally[tuple[str, str]] = dataclasses.field(default_factory=_tally)
    sent_by_pass: Tally[TransferKey] = dataclasses.field(default_factory=_tally)
    operands_by_pass: Tally[TransferKey] = dataclasses.field(default_factory=_tally)
    moved_by_pass: Tally[tuple[str, str]] = dataclasses.field(default_factory=_tally)
    saved: Tally[StackKey] = dataclasses.field(default_factory=_tally)
    param_bytes: float = 0.0

    @property
    def flops(self) -> dict[str, float]:
        """By phase."""
        return _sum_keys(self.flops_by_pass, lambda phase, _: phase)

    @property
    def sent_bytes(self) -> dict[tuple[str, str, tuple[str, ...]], float]:
        """By (phase, kind, axes), all passes together."""
        return _sum_keys(self.sent_by_pass, lambda phase, _, *kind_and_axes: (phase, *kind_and_axes))

    @property
    def operand_bytes(self) -> dict[tuple[str, str, tuple[str, ...]], float]:
        """By (phase, kind, axes)."""
        return _sum_keys(self.operands_by_pass, lambda phase, _, *kind_and_axes: (phase, *kind_and_axes))

    @property
    def moved_bytes(self) -> dict[str, float]:
        """By phase."""
        return _sum_keys(self.moved_by_pass, lambda phase, _: phase)


def _sum_keys(counts: Mapping[Any, float], key: Any) -> dict[Any, float]:
    total: Tally[Any] = _tally()
    for names, value in counts.items():
        total[key(*names)] += value
    return dict(total)


def device_program(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """The body of the one `shard_map` in the jaxpr of a step."""
    (body,) = (e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name == "shard_map")
    return body


def count(jaxpr: core.Jaxpr, axis_sizes: dict[str, int], *, training: bool = True) -> Counts:
    """Counts a device's jaxpr on a mesh of these axes. Without `training`, what is not differentiated is forward."""
    counts = Counts()
    update: Pass = "update" if training else "forward"
    for equation, stack, times in _walk(jaxpr, "", 1.0):
        where = _phase(stack), _pass(stack, update)
        counts.flops_by_pass[where] += times * flops(equation)
        if equation.primitive.name not in _MOVES_NOTHING:
            counts.moved_by_pass[where] += times * sum(map(_num_bytes, (*equation.invars, *equation.outvars)))
        for collective in _collectives(equation, where, axis_sizes):
            key = (*where, collective.kind, collective.axes)
            counts.sent_by_pass[key] += times * collective.sent_bytes
            counts.operands_by_pass[key] += times * collective.operand_bytes
    for equation in jaxpr.eqns:
        if equation.primitive.name == "scan" and _pass(str(equation.source_info.name_stack), update) == "forward":
            for name, num_bytes in _stacked(equation):
                counts.saved[name] += num_bytes
    _drop_zeros(counts.flops_by_pass)
    _drop_zeros(counts.moved_by_pass)
    return counts


def _drop_zeros(counter: dict[Any, float]) -> None:
    for key in [key for key, value in counter.items() if not value]:
        del counter[key]


def _walk(jaxpr: core.Jaxpr, stack: str, times: float) -> Iterator[tuple[core.JaxprEqn, str, float]]:
    """Every operation that is executed, the names around it, and how often."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        inside = f"{stack}/{equation.source_info.name_stack}"
        bodies = [] if name == "pallas_call" else list(core.jaxprs_in_params(equation.params))
        if not bodies:
            yield equation, inside, times
        elif name == "cond":
            yield from max(([*_walk(body, inside, times)] for body in bodies), key=_cost)
        elif name != "while":
            for body in bodies:
                yield from _walk(body, inside, times * equation.params.get("length", 1))


def _cost(operations: list[tuple[core.JaxprEqn, str, float]]) -> tuple[float, int]:
    return sum(times * flops(equation) for equation, _, times in operations), len(operations)


def _phase(stack: str) -> str:
    return next((word for word in reversed(_WORD.findall(stack)) if word in _PHASES), OTHER)


def _pass(stack: str, update: Pass) -> Pass:
    if "rematted_computation" in stack:
        return "recompute"
    if "transpose(" in stack:
        return "backward"
    return "forward" if "jvp(" in stack or FORWARD_ONLY in stack else update


def _collectives(equation: core.JaxprEqn, where: tuple[str, Pass], sizes: dict[str, int]) -> Iterator[Collective]:
    """The collective that an equation is, if it is one and has more than one device."""
    kind = KINDS.get(equation.primitive.name)
    if kind is None:
        return
    named = equation.params.get("axis_name") or equation.params["axes"]
    named = (named,) if isinstance(named, str) else named
    axes = tuple(axis for axis in sizes if axis in named and sizes[axis] > 1)
    groups = equation.params.get("axis_index_groups")
    num_devices = len(groups[0]) if groups else math.prod(sizes[axis] for axis in axes)
    if num_devices > 1:
        num_bytes = sum(map(_num_bytes, equation.invars))
        if equation.primitive.name == "ragged_all_to_all":
            num_bytes = min(map(_num_bytes, equation.invars[:2]))
        phase, pass_ = where
        yield Collective(phase, pass_, kind, axes, num_bytes, num_devices)  # type: ignore[arg-type]  # OTHER, too


def flops(equation: core.JaxprEqn) -> float:
    """FLOPs of the matrix products of an operation, 2 for a multiplication and an addition; 0 for what is none."""
    if equation.primitive.name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        lhs = _shape(equation.invars[0])
        return 2.0 * math.prod(_shape(equation.outvars[0])) * math.prod(lhs[i] for i in contracting)
    if equation.primitive.name == "pallas_call":
        name = equation.params["name"] or "grouped_matmul_tpu"  # megablox gives its kernels no names
        return next((rule(equation, name) for prefix, rule in _KERNELS.items() if name.startswith(prefix)), 0.0)
    return 0.0


def _attention(equation: core.JaxprEqn, name: str) -> float:
    """2 FLOPs a product, half of them behind the causal mask: see `moejax.kernels.attention.cost`."""
    q_shape = next(_floating_shapes(equation))
    seq_len = q_shape[-2 if name.startswith("splash") else -3]  # [..., N, S, H] or [..., S, N, H]
    return cost.products(name) * float(math.prod(q_shape)) * seq_len


def _grouped(equation: core.JaxprEqn, _: str) -> float:
    """Rows [N, D] times each its group's [D, F], every row in some group; or [N, D] and [N, F] to a [D, F] a group."""
    (rows, d), right = [*_floating_shapes(equation)][:2]
    return 2.0 * rows * d * right[1] if len(right) == 2 else 2.0 * rows * math.prod(right[1:])


def _routing(equation: core.JaxprEqn, _: str) -> float:
    """Activations [..., D] times the router's weights, D × E in either order, where the kernel is given those."""
    x, w = map(_shape, equation.invars[:2])
    return 2.0 * math.prod(x) * math.prod(w) / x[-1] if x[-1] in w and 1 not in w else 0.0


_KERNELS = {
    "mha_": _attention,
    "splash_mha_": _attention,
    "grouped_matmul_": _grouped,
    "top_k_routing": _routing,
}


def _shape(x: Any) -> tuple[int, ...]:
    return x.aval.shape


def _floating_shapes(equation: core.JaxprEqn) -> Iterator[tuple[int, ...]]:
    avals: list[Any] = [x.aval for x in equation.invars]
    return (aval.shape for aval in avals if jnp.issubdtype(aval.dtype, jnp.floating))


def _num_bytes(x: Any) -> float:
    aval = x.aval
    return float(math.prod(aval.shape)) * aval.dtype.itemsize if hasattr(aval, "dtype") else 0.0


def _stacked(loop: core.JaxprEqn) -> Iterator[tuple[StackKey, float]]:
    """Yields the name, shape and dtype of each array that a scan stacks up, with its bytes."""
    (body,) = core.jaxprs_in_params(loop.params)
    for result, inside in zip(loop.outvars, body.outvars, strict=True):
        aval: Any = result.aval
        if len(aval.shape) > len(_shape(inside)):  # not carried
            yield (_made_by(body, inside), aval.shape, str(aval.dtype)), _num_bytes(result)


def _made_by(jaxpr: core.Jaxpr, var: Any) -> str:
    """The name that a policy knows a value by, or else that of the operation that makes it, inner loops looked into."""
    maker = next((e for e in jaxpr.eqns if any(out is var for out in e.outvars)), None)
    if maker is None:
        return "argument"
    if maker.primitive.name == "name":
        return maker.params["name"]
    if maker.primitive.name in ("reduce_precision", *_MOVES_NOTHING):  # jax marks what a policy saves with the first
        return _made_by(jaxpr, maker.invars[0])
    bodies = [] if maker.primitive.name == "pallas_call" else core.jaxprs_in_params(maker.params)
    *_, body = [None, *bodies]  # the last branch of a `cond` is the one that works
    if body is None or len(body.outvars) != len(maker.outvars):
        return maker.primitive.name
    return _made_by(body, body.outvars[next(i for i, out in enumerate(maker.outvars) if out is var)])
