"""What a trace says: by phase, compute, communication, what of it is exposed, idle; beside the planner's prediction.

Every instant of a device's steps is counted once. Where several operations run at the same time, computation goes
before communication, so that what is left of a phase's communication is exposed; and phases, what has no phase, and
idle add up to the steps. Sums of the operations' own times are given beside it: where they are more than the phases'
time, operations ran side by side.
"""

from __future__ import annotations

import dataclasses
import statistics
import types
import typing
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moejax.config import check
from moejax.planner.costs import Assumptions
from moejax.planner.hardware import DEVICES, Cluster
from moejax.planner.plan import Plan
from moejax.planner.predict import predict_step
from moejax.planner.report import table
from moejax.profiling.intervals import Interval, intersection, length, subtract, union
from moejax.profiling.phases import PHASES
from moejax.profiling.trace import Event, Trace

UNNAMED = "no phase"
ROWS = (*PHASES, UNNAMED)
_MS = 1e6  # ns


@dataclasses.dataclass(frozen=True)
class Usage:
    """What a device spends its steps on, ms in all of them together.

    `phases` adds up, with `idle_ms`, to `window_ms`: compute of the phase, and communication of it that is exposed.
    `compute_ms` and `communication_ms` are the time in which any of it runs. `op_ms` are sums over operations,
    `backward_ms` the part of them that is of the backward pass.
    """

    window_ms: float
    compute_ms: float
    communication_ms: float
    exposed_ms: float
    idle_ms: float
    phases: dict[str, float]
    exposed: dict[str, float]
    op_ms: dict[str, float]
    backward_ms: dict[str, float]

    @property
    def busy(self) -> float:
        """Part of the time in which something runs, communication included."""
        return 1 - self.idle_ms / self.window_ms

    @property
    def attributed(self) -> float:
        """Part of the operations' time that has a phase."""
        return 1 - self.op_ms[UNNAMED] / sum(self.op_ms.values())


@dataclasses.dataclass(frozen=True)
class Report:
    """A trace's figures: by device, and their mean; the longest operations; and the prediction, of one step."""

    platform: str
    num_steps: int
    tokens: float | None  # of all steps, over all devices
    mean: Usage
    devices: dict[str, Usage]
    longest: list[dict[str, Any]]
    predicted_ms: dict[str, float] | None  # by phase, "bubble" and "host" as well
    predicted_on: str | None

    @property
    def tokens_per_ms(self) -> float | None:
        return self.tokens / self.mean.window_ms if self.tokens else None


def make_report(trace: Trace, num_longest: int = 10) -> Report:
    """The figures of a trace. Without step markers, it counts as one step from its first operation to its last.

    Raises:
      ConfigError: no operation ran inside the steps.
    """
    window = union((marker.start_ns, marker.end_ns) for marker in trace.steps)
    if not window:
        window = [(min(e.start_ns for e in trace.events), max(e.end_ns for e in trace.events))]
    events = [e for e in trace.events if intersection([(e.start_ns, e.end_ns)], window)]
    check(len(events) > 0, "the trace has no operation inside its steps; wait for a step's results in recording.step()")
    by_device: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_device[event.device].append(event)
    devices = {name: measure(by_device[name], window) for name in sorted(by_device, key=_natural)}
    plans = [step.get("plan") for step in trace.facts.get("steps", ())]
    plans = [_build(Plan, plan) for plan in plans if plan]
    known = len(plans) == max(len(trace.steps), 1)
    predicted, on = _predict(plans) if known else (None, None)
    return Report(
        platform=trace.platform,
        num_steps=max(len(trace.steps), 1),
        tokens=sum(plan.tokens for plan in plans) if known else None,
        mean=_mean(list(devices.values())),
        devices=devices,
        longest=_longest(events, num_longest),
        predicted_ms=predicted,
        predicted_on=on,
    )


def measure(events: Iterable[Event], window: Sequence[Interval]) -> Usage:
    """What one device spends `window` (disjoint, ns) on; of operations that reach out of it, only the part inside."""
    spans: dict[tuple[bool, str], list[Interval]] = defaultdict(list)
    phases, exposed, op_ms, backward_ms = (dict.fromkeys(ROWS, 0.0) for _ in range(4))
    for event in events:
        phase = event.phase or UNNAMED
        spans[event.communication, phase].append((event.start_ns, event.end_ns))
        inside = length(intersection([(event.start_ns, event.end_ns)], window)) / _MS
        op_ms[phase] += inside
        backward_ms[phase] += inside * event.backward
    sets = {key: intersection(union(found), window) for key, found in spans.items()}
    compute = union(i for (communication, _), found in sets.items() if not communication for i in found)
    communication = union(i for (communication, _), found in sets.items() if communication for i in found)
    taken: list[Interval] = []
    for kind in (False, True):
        for phase in ROWS:
            new = subtract(sets.get((kind, phase), []), taken)
            taken = union([*taken, *new])
            phases[phase] += length(new) / _MS
            if kind:
                exposed[phase] = length(new) / _MS
    return Usage(
        window_ms=length(window) / _MS,
        compute_ms=length(compute) / _MS,
        communication_ms=length(communication) / _MS,
        exposed_ms=length(subtract(communication, compute)) / _MS,
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


def _longest(events: Iterable[Event], number: int) -> list[dict[str, Any]]:
    """The operations that take most, all runs on all devices together."""
    found: dict[tuple[str, str | None, bool], list[float]] = defaultdict(list)
    for event in events:
        found[event.name, event.phase, event.communication].append(event.duration_ns / _MS)
    most = sorted(found.items(), key=lambda item: -sum(item[1]))[:number]
    return [
        {"name": name, "phase": phase or UNNAMED, "communication": communication, "times": len(ms), "total_ms": sum(ms)}
        for (name, phase, communication), ms in most
    ]


def _natural(name: str) -> tuple[str, int]:
    """So that device 10 comes after 9."""
    text, _, number = name.rpartition(" ")
    return text, int(number)


def _predict(plans: Sequence[Plan]) -> tuple[dict[str, float] | None, str | None]:
    """The mean predicted step by phase, ms; None where there is no plan or its devices have no figures."""
    if not plans or any(plan.mesh.hardware not in DEVICES for plan in plans):
        return None, None
    total: dict[str, float] = defaultdict(float)
    for plan in plans:
        cluster = Cluster.of_mesh(plan.mesh.hardware, plan.mesh)
        for phase, seconds in predict_step(plan, cluster, Assumptions()).by_phase.items():
            total[phase] += 1e3 * seconds / len(plans)
    return dict(total), plans[0].mesh.hardware


def _build(kind: Any, value: Any) -> Any:
    """A dataclass from what `dataclasses.asdict` and JSON made of it."""
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items()})
    if isinstance(value, dict):  # a union with a dataclass in it
        options = typing.get_args(kind) if isinstance(kind, types.UnionType) else ()
        return _build(next(option for option in options if dataclasses.is_dataclass(option)), value)
    return tuple(_build(None, item) for item in value) if isinstance(value, list) else value


def as_data(report: Report) -> dict[str, Any]:
    """The figures for JSON, with units in the keys; times are of all steps together, predicted ones of one."""

    def usage(u: Usage) -> dict[str, Any]:
        return dataclasses.asdict(u) | {"busy_fraction": u.busy, "attributed_fraction": u.attributed}

    return {
        "platform": report.platform,
        "num_steps": report.num_steps,
        "tokens": report.tokens,
        "tokens_per_ms": report.tokens_per_ms,
        "mean": usage(report.mean),
        "devices": {name: usage(u) for name, u in report.devices.items()},
        "longest": report.longest,
        "predicted_step_ms": report.predicted_ms,
        "predicted_on": report.predicted_on,
    }


def as_markdown(report: Report) -> str:
    """All tables, times in ms of one step."""
    tokens = f", {report.tokens_per_ms:.3g} tokens/ms" if report.tokens_per_ms else ""
    n, mean, devices = report.num_steps, report.mean, f"{len(report.devices)} {report.platform.upper()} devices"
    head = (
        f"{n} steps of {mean.window_ms / n:,.2f} ms on {devices}{tokens}; "
        f"{mean.attributed:.1%} of the operations' time has a phase."
    )
    parts = [head, _phase_table(report), _device_table(report), _longest_table(report), *_notes(report)]
    return "\n\n".join(parts)


def _phase_table(report: Report) -> str:
    mean, n = report.mean, report.num_steps
    predicted = report.predicted_ms
    header = ["ms a step, mean of devices", "time", "of the step", "of it exposed communication", "sum of operations",
              "of it backward"]  # fmt: skip
    header += ["predicted", "difference"] if predicted else []

    def row(name: str, ms: float, cells: Sequence[str], expected: float) -> list[str]:
        known = [f"{expected:,.2f}", f"{ms / n - expected:+,.2f}"] if predicted else []
        return [name, f"{ms / n:,.2f}", f"{ms / mean.window_ms:.1%}", *cells, *known]

    guesses: Mapping[str, float] = predicted or {}
    rows = []
    for phase in ROWS:
        values = (mean.exposed[phase], mean.op_ms[phase], mean.backward_ms[phase])
        cells = [f"{v / n:,.2f}" for v in values]
        rows.append(row(phase, mean.phases[phase], cells, guesses.get(phase, 0.0)))
    waits = guesses.get("bubble", 0.0) + guesses.get("host", 0.0)
    rows.append(row("idle (predicted: bubble and host)", mean.idle_ms, ["", "", ""], waits))
    sums = (mean.exposed_ms, sum(mean.op_ms.values()), sum(mean.backward_ms.values()))
    cells = [f"{v / n:,.2f}" for v in sums]
    rows.append(row("**step**", mean.window_ms, cells, sum(guesses.values())))
    return table(header, rows)


def _device_table(report: Report) -> str:
    n = report.num_steps
    header = ("ms a step", "compute", "communication", "exposed", "idle", "busy", "has a phase")
    rows = [
        (
            name,
            *(f"{v / n:,.2f}" for v in (u.compute_ms, u.communication_ms, u.exposed_ms, u.idle_ms)),
            f"{u.busy:.1%}",
            f"{u.attributed:.1%}",
        )
        for name, u in [*report.devices.items(), ("**mean**", report.mean)]
    ]
    return table(header, rows)


def _longest_table(report: Report) -> str:
    total = sum(report.mean.op_ms.values()) * len(report.devices)
    header = ("longest operations", "phase", "kind", "times", "ms, all devices and steps", "of all operations")
    rows = [
        (
            f"`{op['name']}`",
            op["phase"],
            "communication" if op["communication"] else "compute",
            op["times"],
            f"{op['total_ms']:,.2f}",
            f"{op['total_ms'] / total:.1%}",
        )
        for op in report.longest
    ]
    return table(header, rows)


def _notes(report: Report) -> list[str]:
    """What the figures do not say."""
    notes = []
    if report.platform == "cpu":
        notes.append(
            "A trace of virtual CPU devices can't tell how fast links are, nor how much communication can be hidden: "
            "devices share the cores and memory of one machine; a collective's time is mostly its wait until the other "
            "devices' threads have had their turn; nothing runs beside it on its device; idle holds waits for a core "
            "and pipelines' bubbles, which look the same."
        )
    if report.predicted_on == "cpu":
        notes.append(
            "Predicted figures are of one assumed virtual device, a sixteenth of two cores (moejax.planner.hardware), "
            "not of this machine: compare their proportions, or calibrate with experiments/calibrate.py."
        )
    if report.predicted_ms is None:
        notes.append("No prediction: the trace does not say the plan of every step, or its devices have no figures.")
    return notes
