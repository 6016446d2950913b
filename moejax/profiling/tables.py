"""A report of `moejax.profiling.report` written out: Markdown for people, plain data for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from moejax.planner.report import table
from moejax.profiling.report import ROWS, Report, Usage


def as_data(report: Report) -> dict[str, Any]:
    """The figures for JSON, with units in the keys; times are of all steps together, predicted ones of one."""

    def usage(u: Usage) -> dict[str, Any]:
        return dataclasses.asdict(u) | {"busy_fraction": u.busy, "attributed_fraction": u.attributed}

    predicted = report.predicted
    return {
        "platform": report.platform,
        "num_steps": report.num_steps,
        "step_ms": report.step_ms,
        "tokens": report.tokens,
        "tokens_per_ms": report.tokens_per_ms,
        "mfu": report.mfu,
        "hfu": report.hfu,
        "bubble_fraction": report.mean.bubble_ms / report.mean.window_ms if report.bubble is not None else None,
        "mean": usage(report.mean),
        "devices": {name: usage(u) for name, u in report.devices.items()},
        "longest": report.longest,
        "outside_fraction": report.outside,
        "predicted_step_ms": predicted and predicted.step_ms,
        "predicted_phase_ms": predicted and predicted.phase_ms,
        "predicted_on": predicted and predicted.hardware,
    }


def as_markdown(report: Report) -> str:
    """All tables, times in ms of one step."""
    parts = [_head(report), _phase_table(report), _device_table(report), _longest_table(report), *_notes(report)]
    return "\n\n".join(parts)


def _head(report: Report) -> str:
    n, mean = report.num_steps, report.mean
    count = f"{len(report.devices)} {report.platform.upper()} device{'s' * (len(report.devices) > 1)}"
    figures = [f"{n} step{'s' * (n > 1)} of {report.step_ms:,.2f} ms on {count}"]
    if report.tokens_per_ms:
        figures.append(f"{1e3 * report.tokens_per_ms:,.0f} tokens/s")
    if report.predicted and report.mfu is not None and report.hfu is not None:
        figures.append(f"MFU {report.mfu:.1%}, HFU {report.hfu:.1%} of {report.predicted.hardware}'s peak")
    figures.append(f"busy {mean.busy:.1%}")
    figures.append(f"exposed communication {mean.exposed_ms / mean.window_ms:.1%}")
    if report.bubble is not None:
        figures.append(f"bubble {mean.bubble_ms / mean.window_ms:.1%}")
    return f"{', '.join(figures)}; {mean.attributed:.1%} of the operations' time has a phase."


def _phase_table(report: Report) -> str:
    mean, n = report.mean, report.num_steps
    guesses: Mapping[str, float] = report.predicted.phase_ms if report.predicted else {}
    header = ["ms a step, mean of devices", "time", "of the step", "of it exposed communication", "sum of operations",
              "of it backward"]  # fmt: skip
    header += ["predicted", "difference"] if guesses else []

    def row(name: str, ms: float, expected: float, sums: Sequence[float] = ()) -> list[str]:
        cells = [f"{value / n:,.2f}" for value in sums] or ["", "", ""]
        known = [f"{expected:,.2f}", f"{ms / n - expected:+,.2f}"] if guesses else []
        return [name, f"{ms / n:,.2f}", f"{ms / mean.window_ms:.1%}", *cells, *known]

    rows = [
        row(
            phase, mean.phases[phase], guesses.get(phase, 0.0),
            (mean.exposed[phase], mean.op_ms[phase], mean.backward_ms[phase]),
        )
        for phase in ROWS
    ]  # fmt: skip
    if report.bubble is not None:
        rows.append(row("bubble of the pipeline", mean.bubble_ms, guesses.get("bubble", 0.0)))
    rows.append(row("idle (predicted: host)", mean.idle_ms, guesses.get("host", 0.0)))
    sums = (sum(mean.exposed.values()), sum(mean.op_ms.values()), sum(mean.backward_ms.values()))
    rows.append(row("**step**", mean.window_ms, sum(guesses.values()), sums))
    return table(header, rows)


def _device_table(report: Report) -> str:
    n = report.num_steps
    header = ("ms a step", "compute", "communication", "exposed", "bubble", "idle", "busy", "has a phase")
    rows = [
        (
            name,
            *(f"{v / n:,.2f}" for v in (u.compute_ms, u.communication_ms, u.exposed_ms, u.bubble_ms, u.idle_ms)),
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
            f"`{_shorten(op['name'])}`",
            op["phase"],
            "communication" if op["communication"] else "compute",
            op["times"],
            f"{op['total_ms']:,.2f}",
            f"{op['total_ms'] / total:.1%}",
        )
        for op in report.longest
    ]
    return table(header, rows)


def _shorten(name: str, most: int = 60) -> str:
    """Kernels of templates have names of hundreds of letters, in which a bar would end a table's cell."""
    name = name.replace("|", "/")
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _notes(report: Report) -> list[str]:
    """What the figures do not say."""
    notes = []
    if report.outside > 0.05:
        notes.append(
            f"{report.outside:.1%} of the operations' time is in no step, so it is not counted above: an evaluation "
            "between two steps, or steps whose results were not waited for inside recording.step()."
        )
    if report.platform == "cpu":
        notes.append(
            "A trace of virtual CPU devices can't tell how fast links are, nor how much communication can be hidden: "
            "devices share the cores and memory of one machine; a collective's time is mostly its wait until the other "
            "devices' threads have had their turn; nothing runs beside it on its device; idle holds waits for a core. "
            "In a tick of the bubble a virtual device waits while the others' work goes on."
        )
    if report.mean.attributed == 0:
        notes.append(
            "Nothing says of what phase an operation is, and of a CPU's what is communication: trace with "
            "moejax.profiling.capture, and mark each step with its recording.step(number, compiled)."
        )
    elif report.platform == "gpu" and report.mean.attributed < 0.9:
        notes.append(
            "Kernels of command buffers (CUDA graphs) do not say what they are of, so they have no phase: trace a "
            "run with --config.compiler_options=xla_gpu_enable_command_buffer= (empty: none)."
        )
    if report.predicted is None:
        notes.append(
            "No prediction, MFU or HFU: the trace does not say the plan of every step, or its devices have no figures."
        )
    elif report.predicted.hardware == "cpu":
        notes.append(
            "Predicted figures, MFU and HFU are of one assumed virtual device, a sixteenth of two cores "
            "(moejax.planner.hardware), not of this machine: compare proportions, or calibrate with "
            "experiments/calibrate.py."
        )
    if report.mean.bubble_ms:
        notes.append("Compute, communication and busy are of all that runs, in the ticks of the bubble as well.")
    if report.bubble is None:
        notes.append(
            "The pipeline's bubble is not told apart: the trace does not show the shift of every tick, or not what "
            "stage each device is."
        )
    return notes
