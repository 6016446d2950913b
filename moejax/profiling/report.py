"""What a trace says: by phase, compute, communication, what of it is exposed, idle; beside the planner's prediction.

Every instant of a device's steps is counted once. Where several operations run at the same time, computation goes
before communication, so that what is left of a phase's communication is exposed; the ticks in which a pipeline's stage
has no work are its bubble, whatever runs there; and phases, what has no phase, bubble and idle add up to the steps.
Sums of the operations' own times are given beside it: where they are more than the phases' time, operations ran side
by side. `moejax.profiling.tables` writes a report out.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax.checks import check
from moejax.config import ModelConfig
from moejax.layout import Layout
from moejax.overrides import from_record
from moejax.planner.costs import Assumptions
from moejax.planner.hardware import DEVICES, Cluster
from moejax.planner.predict import predict_step
from moejax.profiling.bubble import find_bubble
from moejax.profiling.intervals import Interval, intersection, length, overlap, subtract, union
from moejax.profiling.phases import PHASES, UNNAMED
from moejax.profiling.trace import Event, Trace

ROWS = (*PHASES, UNNAMED)
_MS = 1e6  # ns


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a device spends its steps on, ms in all of them together.

    `phases` adds up, with `bubble_ms` and `idle_ms`, to `window_ms`: compute of the phase, and communication of it that
    is exposed, outside of the bubble; `exposed_ms` is that of all phases. `running_ms`, `compute_ms` and
    `communication_ms` are the time in which anything runs, or any of it, in the bubble as well. `op_ms` are sums over
    operations, `backward_ms` the part of them that is of the backward pass.
    """

    window_ms: float
    running_ms: float
    compute_ms: float
    communication_ms: float
    exposed_ms: float
    bubble_ms: float
    idle_ms: float
    phases: dict[str, float]
    exposed: dict[str, float]
    op_ms: dict[str, float]
    backward_ms: dict[str, float]

    @property
    def busy(self) -> float:
        """Part of the time in which something runs: communication, and what runs in a bubble, included."""
        return self.running_ms / self.window_ms

    @property
    def attributed(self) -> float:
        """Part of the operations' time that has a phase."""
        return 1 - self.op_ms[UNNAMED] / sum(self.op_ms.values())


@dataclasses.dataclass(frozen=True)
class Predicted:
    """The planner's mean step, ms: by phase, with "bubble" and "host", and the time that its FLOPs take at peak."""

    hardware: str
    phase_ms: dict[str, float]
    model_ms: float  # matrix FLOPs of the model's mathematics, no rematerialization, causal attention halved
    executed_ms: float  # those that are executed, outside of the bubble

    @property
    def step_ms(self) -> float:
        return sum(self.phase_ms.values())


@dataclasses.dataclass(frozen=True)
class Report:
    """A trace's figures: by device, and their mean; the longest operations; and the prediction, of one step."""

    platform: str
    num_steps: int
    tokens: float | None  # of all steps, over all devices
    bubble: dict[str, list[Interval]] | None  # by device, ns; None: not told apart, its time is that of phases and idle
    mean: Usage
    devices: dict[str, Usage]
    longest: list[dict[str, Any]]
    predicted: Predicted | None
    outside: float  # part of the operations' time that is in no step, and not counted

    @property
    def step_ms(self) -> float:
        return self.mean.window_ms / self.num_steps

    @property
    def tokens_per_ms(self) -> float | None:
        return self.tokens / self.mean.window_ms if self.tokens else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs over what the devices' datasheet peak could do in the steps' time."""
        return self.predicted.model_ms / self.step_ms if self.predicted else None

    @property
    def hfu(self) -> float | None:
        """As `mfu`, of executed FLOPs: what rematerialization computes again is counted."""
        return self.predicted.executed_ms / self.step_ms if self.predicted else None


def make_report(trace: Trace, num_longest: int = 10) -> Report:
    """The figures of a trace. Without step markers, it counts as one step from its first operation to its last.

    Raises:
      ConfigError: no operation ran inside the steps.
    """
    window = union((marker.start_ns, marker.end_ns) for marker in trace.steps)
    if not window:
        window = [(min(e.start_ns for e in trace.events), max(e.end_ns for e in trace.events))]
    events = [e for e in trace.events if overlap(e.start_ns, e.end_ns, window)]
    check(len(events) > 0, "the trace has no operation inside its steps; wait for a step's results in recording.step()")
    by_device: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
    facts = {step["step"]: step for step in trace.facts.get("steps", ())}
    known = bool(trace.steps) and all(facts.get(marker.step, {}).get("layout") for marker in trace.steps)
    ran = [_read_step(facts[marker.step], marker.step) for marker in trace.steps] if known else []
    bubble = _bubble(by_device, trace, [layout for _, layout in ran]) if known else None
    devices = {
        name: measure(by_device[name], window, bubble[name] if bubble else ())
        for name in sorted(by_device, key=_natural)
    }
    inside_ms = sum(sum(usage.op_ms.values()) for usage in devices.values())
    return Report(
        platform=trace.platform,
        num_steps=max(len(trace.steps), 1),
        tokens=sum(layout.tokens for _, layout in ran) if known else None,
        bubble=bubble,
        mean=_mean(list(devices.values())),
        devices=devices,
        longest=_longest(events, window, num_longest),
        predicted=_predict(ran),
        outside=1 - inside_ms * _MS / sum(e.duration_ns for e in trace.events),
    )


def _bubble(
    events: Mapping[str, Sequence[Event]], trace: Trace, layouts: Sequence[Layout]
) -> dict[str, list[Interval]] | None:
    """The bubble of all steps by device; None where one step's cannot be told."""
    found: dict[str, list[Interval]] = {device: [] for device in events}
    stages = {step["step"]: step.get("stages", {}) for step in trace.facts["steps"]}
    for marker, layout in zip(trace.steps, layouts, strict=True):
        at = {f"{trace.platform.upper()} {number}": stage for number, stage in stages[marker.step].items()}
        step = find_bubble(events, at, layout, (marker.start_ns, marker.end_ns))
        if step is None:
            return None
        for device, ticks in step.items():
            found[device] += ticks
    return found


def measure(events: Iterable[Event], window: Sequence[Interval], bubble: Sequence[Interval] = ()) -> Usage:
    """What one device spends `window` on; of operations that reach out of it, only the part inside.

    `window` and `bubble` are disjoint intervals in order, ns. What runs in the bubble is of no phase's time.
    """
    spans: dict[tuple[bool, str], list[Interval]] = defaultdict(list)
    phases, exposed, op_ms, backward_ms = (dict.fromkeys(ROWS, 0.0) for _ in range(4))
    for event in events:
        phase = event.phase or UNNAMED
        spans[event.communication, phase].append((event.start_ns, event.end_ns))
        inside = overlap(event.start_ns, event.end_ns, window) / _MS
        op_ms[phase] += inside
        backward_ms[phase] += inside * event.backward
    sets = {key: intersection(union(found), window) for key, found in spans.items()}
    compute = union(i for (communication, _), found in sets.items() if not communication for i in found)
    communication = union(i for (communication, _), found in sets.items() if communication for i in found)
    lost = intersection(window, bubble)
    taken: list[Interval] = lost
    for kind in (False, True):
        for phase in ROWS:
            new = subtract(sets.get((kind, phase), []), taken)
            taken = union([*taken, *new])
            phases[phase] += length(new) / _MS
            if kind:
                exposed[phase] = length(new) / _MS
    return Usage(
        window_ms=length(window) / _MS,
        running_ms=length(union([*compute, *communication])) / _MS,
        compute_ms=length(compute) / _MS,
        communication_ms=length(communication) / _MS,
        exposed_ms=sum(exposed.values()),
        bubble_ms=length(lost) / _MS,
        idle_ms=length(subtract(window, taken)) / _MS,
        phases=phases,
        exposed=exposed,
        op_ms=op_ms,
        backward_ms=backward_ms,
    )


def _mean(usages: Sequence[Usage]) -> Usage:
    """The mean over devices, of every figure."""

    def mean(name: str) -> Any:
        values = [getattr(usage, name) for usage in usages]
        if not isinstance(values[0], dict):
            return statistics.fmean(values)
        return {row: statistics.fmean(value[row] for value in values) for row in ROWS}

    return Usage(**{field.name: mean(field.name) for field in dataclasses.fields(Usage)})


def _longest(events: Iterable[Event], window: Sequence[Interval], number: int) -> list[dict[str, Any]]:
    """The operations that take most of `window`, all runs on all devices together."""
    found: dict[tuple[str, str | None, bool], list[float]] = defaultdict(list)
    for event in events:
        inside = overlap(event.start_ns, event.end_ns, window) / _MS
        found[event.name, event.phase, event.communication].append(inside)
    most = sorted(found.items(), key=lambda item: -sum(item[1]))[:number]
    return [
        {"name": name, "phase": phase or UNNAMED, "communication": communication, "times": len(ms), "total_ms": sum(ms)}
        for (name, phase, communication), ms in most
    ]


def _natural(name: str) -> tuple[str, int]:
    """So that device 10 comes after 9."""
    text, _, number = name.rpartition(" ")
    return text, int(number)


def _predict(ran: Sequence[tuple[ModelConfig, Layout]]) -> Predicted | None:
    """None where no step's layout is known or its devices have no figures."""
    if not ran or any(layout.mesh.hardware not in DEVICES for _, layout in ran):
        return None
    phase_ms: dict[str, float] = defaultdict(float)
    model_ms = executed_ms = 0.0
    for model, layout in ran:
        time = predict_step(model, layout, Cluster.of_mesh(layout.mesh.hardware, layout.mesh), Assumptions())
        each_ms = 1e3 / len(ran)
        for phase, seconds in time.by_phase.items():
            phase_ms[phase] += each_ms * seconds
        model_ms += each_ms * time.mfu * time.expected
        executed_ms += each_ms * time.hfu * time.expected
    return Predicted(ran[0][1].mesh.hardware, dict(phase_ms), model_ms, executed_ms)


def _read_step(facts: Mapping[str, Any], number: int) -> tuple[ModelConfig, Layout]:
    model, _ = from_record(ModelConfig, facts["model"], f"model of step {number}")
    layout, _ = from_record(Layout, facts["layout"], f"layout of step {number}")
    return model, layout
