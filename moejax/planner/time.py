"""How long a step takes: every entry of its `Work` in seconds, what overlaps taken off, as an interval.

    spans = AxisSpans.of(mesh_config)
    time = predict_time(work, cluster, spans, step=StepFacts(tokens=tokens, model_flops=flops, bubble=1 / 9))
    print(time.expected, time.by_category, time.mfu, time.dominant)

A matrix product runs at the rate that the device reaches on large ones, times an efficiency in (0, 1] that falls
smoothly where a dimension is small (`matmul_efficiency`), and never faster than memory delivers its operands. A memory
operation runs at the bandwidth of a copy. A collective takes α + β·bytes on the links that it uses
(`collective_seconds`). What can run behind computation is hidden up to the fractions of `Assumptions`, and costs a part
of itself in return, for it takes cores and bandwidth from what it hides behind.

The interval adds in squares what the step gains or loses when each uncertain assumption alone moves by its stated
spread; `StepTime.dominant` names the largest.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from moejax.checks import check
from moejax.mesh import MeshConfig
from moejax.planner.costs import Assumptions, collective_seconds, matmul_seconds, rates
from moejax.planner.hardware import Cluster
from moejax.planner.work import Collective, Matmul, MemoryOp

PIPELINED = frozenset(("attention", "route", "dispatch", "expert", "combine", "pipeline"))
_ROUTED = frozenset(("dispatch", "expert", "combine"))


@dataclasses.dataclass(frozen=True)
class StepFacts:
    """What the list of work does not say of its step.

    Attributes:
      tokens: of the step, over all devices.
      model_flops: matrix FLOPs of the step over all devices, without rematerialization, causal attention halved.
      bubble: part of the pipeline's ticks in which a stage has nothing to do.
      bubble_counted: whether the entries' `times` include those ticks (computed, as on accelerators) or not.
      parts: independent parts whose exchanges can run behind each other's products: batch_split × chunks.
      load: tokens of the busiest device's experts over the mean, for expert work whose size follows the load.
      rounds: mean rounds of a dropless dispatch.
      host_s: seconds that the host takes to start the operations of the step; 0 where one program holds them all.
      host_waits: part of the shorter of host's and device's time that is not hidden behind the longer, because the host
        waits for results (sizes of buffers) before it can go on.
    """

    tokens: float = 0.0
    model_flops: float = 0.0
    bubble: float = 0.0
    bubble_counted: bool = True
    parts: int = 1
    load: float = 1.0
    rounds: float = 1.0
    host_s: float = 0.0
    host_waits: float = 0.0

    def __post_init__(self) -> None:
        check(0 <= self.bubble < 1, f"bubble={self.bubble} must be at least 0 and below 1")
        check(self.load >= 1, f"load={self.load} must be 1 or more: the busiest over the mean")
        check(self.rounds >= 1, f"rounds={self.rounds} must be 1 or more")
        check(self.parts >= 1, f"parts={self.parts} must be 1 or more")


@dataclasses.dataclass(frozen=True)
class AxisSpans:
    """The size of each mesh axis and how many hosts it crosses: axis -> (size, hosts)."""

    axes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(cls, mesh: MeshConfig) -> AxisSpans:
        """As `moejax.mesh.build_mesh` places devices: `host_axis` and replicas leave a host."""
        return cls({axis: (n, mesh.hosts_along(axis)) for axis, n in mesh.shape.items()})

    def span(self, axes: Iterable[str], num_devices: int) -> tuple[int, int]:
        """(devices inside one host, hosts) of a group along `axes`; an axis that is not there stays inside."""
        hosts = 1
        for axis in axes:
            if axis in self.axes:
                hosts *= self.axes[axis][1]
        hosts = min(hosts, num_devices)
        return max(num_devices // hosts, 1), hosts


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step: `expected` within `low` and `high`, and what they are spent on.

    `by_phase` (the phases of the work, "bubble" and "host") and `by_category` each add up to `expected`.
    `communication` is every collective's time by phase, hidden or not. `mfu` counts model FLOPs, `hfu` executed ones,
    both against the device's datasheet peak. `spreads` are the seconds that each assumption moves the step by.
    """

    low: float
    expected: float
    high: float
    by_phase: dict[str, float]
    by_category: dict[str, float]
    communication: dict[str, float]
    spreads: dict[str, float]
    mfu: float
    hfu: float
    tokens_per_s_per_device: float
    tokens_per_ms: float

    @property
    def dominant(self) -> str:
        """The assumption that moves the step most."""
        return max(self.spreads, key=self.spreads.__getitem__)

    @property
    def busy(self) -> float:
        """Part of the step in which the device computes what is wanted: not waiting, not in a bubble."""
        idle = sum(self.by_category[name] for name in ("communication", "bubble", "host"))
        return 1 - idle / self.expected if self.expected else 0.0


# Which fraction of `Assumptions` says how much of a phase's collectives is hidden; all others' is the tensor axis's.
_CLASSES = {
    "gather": "gather",
    "optimizer": "gather",
    "dispatch": "exchange",
    "combine": "exchange",
    "pipeline": "stage",
}


def _hidden(seconds: Mapping[str, float], cover: float, parts: int, assumptions: Assumptions) -> dict[str, float]:
    """Seconds of each class of collectives that run behind `cover` seconds of computation, which they share in turn."""
    fractions = (
        ("gather", assumptions.gather_hidden),
        ("exchange", assumptions.exchange_hidden * (1 - 1 / parts)),
        ("stage", assumptions.stage_hidden),
        ("tensor", assumptions.tensor_hidden),
    )
    hidden = {}
    for name, fraction in fractions:
        hidden[name] = min(fraction * seconds[name], cover)
        cover -= hidden[name]
    return hidden


def predict_time(
    work: Iterable[Matmul | Collective | MemoryOp],
    cluster: Cluster,
    spans: AxisSpans,
    assumptions: Assumptions = Assumptions(),
    *,
    step: StepFacts = StepFacts(),
) -> StepTime:
    """The time of one step in which a device of `cluster` does `work`.

    `spans` says which axes of the collectives leave a host. `step` says what the list does not; without it there is
    no bubble, nothing to hide exchanges behind, balanced load, and throughput and MFU are 0.
    """
    rate = rates(cluster.device, assumptions)
    routed = step.load * step.rounds
    compute: dict[str, float] = defaultdict(float)
    memory: dict[str, float] = defaultdict(float)
    collectives: dict[str, float] = defaultdict(float)
    executed = wasted = optimizer = 0.0
    for item in work:
        phase = item.phase
        factor = item.times * routed if phase in _ROUTED else item.times
        if isinstance(item, Matmul):
            computing, moving = matmul_seconds(item, rate)
            bound = compute if computing >= moving else memory
            bound[phase] += factor * item.filled * (max(computing, moving) + rate.launch)
            flops = 2.0 * item.m * item.n * item.k * item.groups * item.times * item.filled
            executed += flops
            if phase in PIPELINED:
                wasted += flops
        elif isinstance(item, MemoryOp):
            seconds = factor * (item.moved_bytes / rate.copy + rate.launch)
            if phase == "optimizer":
                optimizer += seconds
            else:
                memory[phase] += seconds
        else:
            n = item.num_devices
            span = (n, 1) if cluster.one_network else spans.span(item.axes, n)
            collectives[phase] += factor * collective_seconds(item, span, rate)
    executed -= wasted * step.bubble if step.bubble_counted else 0.0
    sums = _Sums(compute, memory, collectives, optimizer, executed, rate.tpu)
    return _assemble(sums, cluster, assumptions, step)


class _Sums(NamedTuple):
    """Seconds by phase, each kind by itself, and executed FLOPs."""

    compute: dict[str, float]
    memory: dict[str, float]
    collectives: dict[str, float]
    optimizer: float
    executed: float
    tpu: bool


def _assemble(sums: _Sums, cluster: Cluster, assumptions: Assumptions, step: StepFacts) -> StepTime:
    """Takes off what overlaps, adds what waits, and moves each assumption by its spread."""
    totals = dict.fromkeys(("gather", "exchange", "stage", "tensor"), 0.0)
    for phase, seconds in sums.collectives.items():
        totals[_CLASSES.get(phase, "tensor")] += seconds
    compute_s, memory_s = sum(sums.compute.values()), sum(sums.memory.values())
    hidden = _hidden(totals, compute_s + memory_s, step.parts, assumptions)
    hidden_s = sum(hidden.values())
    contention = 0.0 if sums.tpu else assumptions.contention
    paid = {  # of each second of a collective, what the step takes longer for it
        name: 1 - (1 - contention) * hidden[name] / seconds if seconds else 0.0 for name, seconds in totals.items()
    }
    communication_s = sum(paid[name] * seconds for name, seconds in totals.items())
    running = compute_s + memory_s + communication_s
    by_phase = _by_phase(sums, paid)

    # A bubble that is counted is a part of every pipelined entry; one that is not is as many ticks more.
    pipelined = sum(seconds for phase, seconds in by_phase.items() if phase in PIPELINED)
    bubble = pipelined * (step.bubble if step.bubble_counted else step.bubble / (1 - step.bubble))
    kept = 1.0
    if bubble and step.bubble_counted:
        kept = 1 - bubble / running
        for phase in PIPELINED & by_phase.keys():
            by_phase[phase] *= 1 - step.bubble
    host = max(step.host_s - running, 0.0) + step.host_waits * min(step.host_s, running)
    by_phase |= {"bubble": bubble, "host": host}
    by_category = {
        "compute": compute_s * kept,
        "memory": memory_s * kept,
        "communication": communication_s * kept,
        "bubble": bubble,
        "optimizer": sums.optimizer,
        "host": host,
    }
    stretch = 1 / (1 - step.bubble) if not step.bubble_counted else 1.0
    moved = {
        "rate of matrix products": assumptions.matmul_spread * compute_s,
        "memory bandwidth": assumptions.memory_spread * (memory_s + sums.optimizer),
        "bandwidth of links": assumptions.link_spread * (sum(totals.values()) - hidden_s),
        "overlap": assumptions.overlap_spread * hidden_s,
        "load of experts": assumptions.load_spread * sums.compute.get("expert", 0.0) * (step.load * step.rounds > 1),
    }
    spreads = {name: seconds * stretch for name, seconds in moved.items()}
    return _result(by_phase, by_category, spreads, sums, cluster, step)


def _by_phase(sums: _Sums, paid: Mapping[str, float]) -> dict[str, float]:
    found = dict(sums.compute)
    for phase, seconds in sums.memory.items():
        found[phase] = found.get(phase, 0.0) + seconds
    for phase, seconds in sums.collectives.items():
        found[phase] = found.get(phase, 0.0) + seconds * paid[_CLASSES.get(phase, "tensor")]
    if sums.optimizer:
        found["optimizer"] = found.get("optimizer", 0.0) + sums.optimizer
    return found


def _result(
    by_phase: dict[str, float],
    by_category: dict[str, float],
    spreads: dict[str, float],
    sums: _Sums,
    cluster: Cluster,
    step: StepFacts,
) -> StepTime:
    """The interval, throughput and utilization."""
    expected = sum(by_category.values())
    half = math.sqrt(sum(seconds * seconds for seconds in spreads.values()))
    devices, peak = cluster.num_devices, float(cluster.device.peak_flops)
    per_s = 1 / expected if expected else 0.0
    return StepTime(
        low=expected * expected / (expected + half) if expected else 0.0,
        expected=expected,
        high=expected + half,
        by_phase=by_phase,
        by_category=by_category,
        communication=dict(sums.collectives),
        spreads=spreads,
        mfu=step.model_flops / devices * per_s / peak,
        hfu=sums.executed * per_s / peak,
        tokens_per_s_per_device=step.tokens / devices * per_s,
        tokens_per_ms=step.tokens * per_s / 1e3,
    )
