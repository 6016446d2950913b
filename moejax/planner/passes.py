"""From a forward pass to a training step: what the backward pass does, and what is computed again for it.

- A product y = x w has two in the backward pass, dx = dy wᵀ and dw = xᵀ dy. An all-gather has a reduce-scatter there, a
  reduce-scatter an all-gather, an all-to-all another, and a sum over devices nothing.
- What is computed again is what the backward pass asks for and the rematerialization policy does not keep. `KEPT` was
  read off the traces of all policies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal

from moejax.planner.work import Collective, Kind, Matmul, MemoryOp, Phase

# What a result is to a rematerialization policy, see `moejax.remat`:
#   projection  a named product: queries, keys and values, gate and up
#   scores      what the attention kernel's backward pass needs of its forward pass
#   network     what crossed the network, and so the product whose result it was: attention's output, experts' results
#   result      what nothing names: logits, sorted gates
#   routing     what the router's kernel gives
#   recomputed  what no policy keeps: weights gathered for a layer, integers that devices agree on
#   unused      the backward pass does not ask for it
Result = Literal["projection", "scores", "network", "result", "routing", "recomputed", "unused"]
KEPT: dict[str, frozenset[Result]] = {
    "none": frozenset(("projection", "scores", "network", "result", "routing", "unused")),
    "minimal": frozenset(("projection", "scores", "network", "routing", "unused")),
    "collectives": frozenset(("network", "routing", "unused")),
    "full": frozenset(("unused",)),
}
_TRANSPOSED: dict[Kind, Kind | None] = {
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "all_to_all": "all_to_all",
    "ppermute": "ppermute",
    "all_reduce": None,
}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Passes:
    """Writes the entries of a part for every pass: forward, again where `policy` asks for it, and backward."""

    def __init__(self, axis_sizes: Mapping[str, int], dtype: str, policy: str) -> None:
        self.size, self.dtype, self.itemsize = axis_sizes, dtype, BYTES[dtype]
        self.kept = KEPT[policy]
        self._devices: dict[frozenset[str], tuple[tuple[str, ...], int]] = {}

    def passes_of(self, result: Result) -> tuple[Literal["forward", "recompute"], ...]:
        """The passes in which something is computed whose result is such."""
        return ("forward",) if result in self.kept else ("forward", "recompute")

    def matmul(
        self, phase: Phase, m: float, n: float, k: float, times: float, result: Result, groups: float = 1,
        filled: float = 1,
    ) -> Iterator[Matmul]:  # fmt: skip
        """[m, k] × [k, n] by a weight, and the gradients of both."""
        for pass_ in self.passes_of(result):
            yield Matmul(phase, pass_, m, n, k, groups, times, self.dtype, filled)
        yield Matmul(phase, "backward", m, k, n, groups, times, self.dtype, filled)
        yield Matmul(phase, "backward", k, n, m, groups, times, self.dtype, filled)

    def devices(self, axes: Iterable[str]) -> tuple[tuple[str, ...], int]:
        """Those of the axes that have more than one device, as the mesh orders them, and their devices."""
        key = frozenset(axes)
        if key not in self._devices:
            found = tuple(axis for axis in self.size if axis in key and self.size[axis] > 1)
            self._devices[key] = found, math.prod(self.size[axis] for axis in found)
        return self._devices[key]

    def collective(
        self, phase: Phase, kind: Kind, axes: Iterable[str], num_bytes: float, times: float, result: Result = "unused",
        *, back_bytes: float | None = None, hosts: int = 1,
    ) -> Iterator[Collective]:  # fmt: skip
        """A collective of operands of `num_bytes`, and its counterpart in the backward pass, of `back_bytes`."""
        axes, num_devices = self.devices(axes)
        if num_devices == 1:
            return
        for pass_ in self.passes_of(result):
            yield Collective(phase, pass_, kind, axes, num_bytes, num_devices, times, hosts)
        back = _TRANSPOSED[kind]
        if back:
            arrived = {"all_gather": num_bytes * num_devices, "reduce_scatter": num_bytes / num_devices}
            back_bytes = arrived.get(kind, num_bytes) if back_bytes is None else back_bytes
            yield Collective(phase, "backward", back, axes, back_bytes, num_devices, times, hosts)

    def no_gradient(
        self, phase: Phase, kind: Kind, axes: Iterable[str], num_bytes: float, times: float, result: Result = "unused"
    ) -> Iterator[Collective]:
        """A collective of what has no gradient."""
        return (t for t in self.collective(phase, kind, axes, num_bytes, times, result) if t.pass_ != "backward")

    def in_pass(
        self, phase: Phase, pass_: Literal["backward", "update"], axes: Iterable[str], num_bytes: float, times: float
    ) -> Iterator[Collective]:
        """A sum over devices in one pass."""
        axes, num_devices = self.devices(axes)
        if num_devices > 1:
            yield Collective(phase, pass_, "all_reduce", axes, num_bytes, num_devices, times)

    def memory_op(
        self, phase: Phase, elements: float, times: float, forward: float, backward: float
    ) -> Iterator[MemoryOp]:
        """Elements of the compute dtype that a pass reads or writes `forward` times, its gradient `backward` times."""
        yield MemoryOp(phase, "forward", forward * elements * self.itemsize, times)
        if not self.kept >= {"projection"}:
            yield MemoryOp(phase, "recompute", forward * elements * self.itemsize, times)
        yield MemoryOp(phase, "backward", backward * elements * self.itemsize, times)
