"""What one device does in one step, as a list: matrix products, collectives, and passes over memory.

It is the common language of the planner. Closed forms write it (`moejax.planner.program` for moejax's own step,
`experiments/published_runs` for other systems' runs); its sums by phase are held against the program's own
(`moejax.profiling.step_counts`) and the compiler's text; `moejax.planner.time` says how long each entry takes on a
cluster.

All amounts are of one device and one step: `times` counts how often an entry is done in it, bubbles of the pipeline
that are computed included.

What belongs to which phase, in moejax's program as here:

| phase       |                                                                                                       |
|-------------|-------------------------------------------------------------------------------------------------------|
| `embed`     | rows of the table, summed over the parts of the vocabulary                                            |
| `attention` | its norm, projections, rotation, kernel, and what the tensor axis exchanges                           |
| `route`     | the norm before it, the router, sums of its figures over devices                                      |
| `dispatch`  | which row goes where, rows on their way to experts                                                    |
| `expert`    | experts, shared experts, feed-forward of dense layers; a split width's exchanges over `tensor`        |
| `combine`   | rows on their way back, weighted sums                                                                 |
| `pipeline`  | what stages hand each other, the schedule's buffers                                                   |
| `logits`    | the last norm, the output layer                                                                       |
| `loss`      | the softmax over the vocabulary, means over tokens                                                    |
| `gather`    | weights: gathers, scatters and sums of their gradients, compute copies                                |
| `optimizer` | the gradients' norm, the update                                                                       |
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Phase = Literal[
    "embed", "attention", "route", "dispatch", "expert", "combine", "pipeline", "logits", "loss", "gather", "optimizer",
]  # fmt: skip
Mode = Literal["train", "prefill", "decode"]  # a training step, the forward pass alone, or one token per sequence
Pass = Literal["forward", "recompute", "backward", "update"]
Kind = Literal["all_to_all", "all_gather", "reduce_scatter", "all_reduce", "ppermute"]


@dataclasses.dataclass(frozen=True)
class Matmul:
    """`groups` matrix products [m, k] × [k, n], done `times` times.

    `filled` is the part of the rows that are expected to hold anything: `flops` count them all, as the trace does, but
    a grouped product spends no time on the others.
    """

    phase: Phase
    pass_: Pass
    m: float
    n: float
    k: float
    groups: float = 1
    times: float = 1
    dtype: str = "bfloat16"
    filled: float = 1

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k * self.groups * self.times


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective over mesh axes. `operand_bytes` are those of its operand on one device, once."""

    phase: Phase
    pass_: Pass
    kind: Kind
    axes: tuple[str, ...]
    operand_bytes: float
    num_devices: int  # along the axes
    times: float = 1
    hosts: int = 1  # of two hops: how many hosts the devices are in; `num_devices` are then all of them

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends to others in a step, as a ring would (all-reduce: reduce-scatter, all-gather).

        In two hops what leaves the host has been sent once before, inside it.
        """
        if self.hosts > 1:
            hops = (1 - self.hosts / self.num_devices) + (1 - 1 / self.hosts)
            return hops * self.operand_bytes * self.times
        others = self.num_devices - 1
        factor = {
            "all_gather": others,
            "all_reduce": 2 * others / self.num_devices,
            "ppermute": 1 if others else 0,
        }.get(self.kind, others / self.num_devices)
        return factor * self.operand_bytes * self.times


@dataclasses.dataclass(frozen=True)
class MemoryOp:
    """What reads and writes device memory without a matrix product: norms, gathers of rows, casts, the optimizer."""

    phase: Phase
    pass_: Pass
    moved_bytes: float
    times: float = 1


Work = list[Matmul | Collective | MemoryOp]
