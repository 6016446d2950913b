"""A picture of one step of a trace: what every device did when, by phase, and the step by phase beside the prediction.

Dimensions: D devices, K lanes of a device (computation, communication), X columns of the picture, F phases (with "no
phase").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from moejax.plots import pyplot
from moejax.profiling.report import ROWS, Report
from moejax.profiling.trace import Event, Marker, Trace

COLUMNS = 1500  # about a pixel each
_COLORS = {
    "embed": "#8c564b", "attention": "#1f77b4", "route": "#e377c2", "dispatch": "#ff7f0e", "expert": "#2ca02c",
    "combine": "#d62728", "pipeline": "#9467bd", "logits": "#17becf", "loss": "#bcbd22", "gather": "#e7ba52",
    "optimizer": "#393b79", "no phase": "#555555", "bubble": "#bbbbbb", "idle": "#eeeeee", "host": "#eeeeee",
}  # fmt: skip
_MS = 1e6  # ns


def figure(trace: Trace, report: Report) -> Any:
    """Above: the step that took the median time, a row a device, computation in its upper and communication in its
    lower lane. Below: all steps by phase, and the prediction, each as parts of itself.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    plt = pyplot()
    step = _median_step(trace)
    devices = list(report.devices)
    rows = max(len(devices) * 0.3, 1.2)  # inches
    bars = 1.5 if report.predicted else 1.1
    fig = plt.figure(figsize=(14, rows + bars + 2.4), layout="constrained")
    fig.get_layout_engine().set(h_pad=0.08, w_pad=0.1)
    top, low = fig.subplots(2, 1, height_ratios=(rows, bars))
    _draw_devices(top, trace, step, report, devices)
    _draw_bars(low, report)
    _draw_legend(fig, [*ROWS, *(["bubble"] if report.bubble is not None else []), "idle"])
    return fig


def _median_step(trace: Trace) -> Marker:
    """Of an even number of steps, the shorter of the two in the middle; without markers, everything."""
    if not trace.steps:
        return Marker(0, min(e.start_ns for e in trace.events), max(e.end_ns for e in trace.events))
    by_time = sorted(trace.steps, key=lambda marker: marker.end_ns - marker.start_ns)
    return by_time[(len(by_time) - 1) // 2]


def rasterize(events: Iterable[Event], start_ns: float, end_ns: float, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """One device's events cut into columns of equal time.

    Returns:
        time_KXF: part of each column that each phase's operations take, above 1 in sum where some run side by side.
        backward_X: the part of all that is of the backward pass; nan where nothing runs.
    """
    width = (end_ns - start_ns) / columns
    time_KXF = np.zeros((2, columns, len(ROWS)))
    backward_X = np.zeros(columns)
    for event in events:
        begin, end = (event.start_ns - start_ns) / width, (event.end_ns - start_ns) / width
        begin, end = max(begin, 0.0), min(end, float(columns))
        if begin >= end:
            continue
        first, last = int(begin), min(int(np.ceil(end)), columns)
        part = np.ones(last - first)
        part[0] -= begin - first
        part[-1] -= last - end
        time_KXF[int(event.communication), first:last, ROWS.index(event.phase or ROWS[-1])] += part
        backward_X[first:last] += part * event.backward
    with np.errstate(invalid="ignore"):
        return time_KXF, backward_X / time_KXF.sum((0, 2))


def _draw_devices(ax: Any, trace: Trace, step: Marker, report: Report, devices: list[str]) -> None:
    plt = pyplot()
    to_rgb = plt.matplotlib.colors.to_rgb
    colors_FC = np.array([to_rgb(_COLORS[phase]) for phase in ROWS])
    length_ms = (step.end_ns - step.start_ns) / _MS
    events: dict[str, list[Event]] = {device: [] for device in devices}
    for event in trace.events:
        if event.start_ns < step.end_ns and event.end_ns > step.start_ns:
            events[event.device].append(event)
    image = np.ones((len(devices), 10, COLUMNS, 3))  # ten lines a device: 1 of pass, 4, 4 of lanes, 1 between devices
    for row, device in enumerate(devices):
        time_KXF, backward_X = rasterize(events[device], step.start_ns, step.end_ns, COLUMNS)
        covered_KX = np.minimum(time_KXF.sum(-1), 1.0)[..., None]
        most_KXC = colors_FC[time_KXF.argmax(-1)]
        lanes_KXC = most_KXC * covered_KX + (1 - covered_KX)
        image[row, 0] = 1 - 0.8 * np.nan_to_num(backward_X)[:, None]
        image[row, 1:5], image[row, 5:9] = lanes_KXC[0], lanes_KXC[1]
    ax.imshow(
        image.reshape(-1, COLUMNS, 3), extent=(0, length_ms, len(devices) - 0.5, -0.5), aspect="auto",
        interpolation="nearest",
    )  # fmt: skip
    for row, device in enumerate(devices):
        for start, end in report.bubble[device] if report.bubble else ():
            if step.start_ns <= start < step.end_ns:
                at = [(start - step.start_ns) / _MS, (end - step.start_ns) / _MS]
                ax.fill_between(at, row - 0.4, row + 0.4, facecolor="none", edgecolor="#999999", hatch="////", lw=0)
    ax.set_yticks(range(len(devices)), devices)
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("ms since the step began")
    ax.xaxis.set_major_formatter("{x:,g}")
    name = f"step {step.step}" if trace.steps else "the trace"
    ax.set_title(
        f"{name}, {length_ms:,.1f} ms: one row per device; upper lane computation, lower lane communication, "
        "black above: backward pass"
    )


def _draw_bars(ax: Any, report: Report) -> None:
    """Parts of the step, their names where there is room."""
    n, mean = report.num_steps, report.mean
    measured = {phase: mean.phases[phase] / n for phase in ROWS}
    measured |= {"bubble": mean.bubble_ms / n, "idle": mean.idle_ms / n}
    bars = [(f"measured\n{report.step_ms:,.1f} ms", measured)]
    if report.predicted:
        bars.append((f"predicted for\n{report.predicted.hardware}, {report.predicted.step_ms:,.1f} ms",
                     report.predicted.phase_ms))  # fmt: skip
    for row, (_, parts) in enumerate(bars):
        left, total = 0.0, sum(parts.values())
        for name in (name for name in _COLORS if parts.get(name)):
            width = 100 * parts[name] / total
            ax.barh(row, width, left=left, height=0.7, color=_COLORS[name], edgecolor="white", linewidth=0.5)
            if width >= 5:
                dark = name not in ("bubble", "idle", "host", "gather", "loss")
                ax.text(
                    left + width / 2, row, f"{name}\n{width:.0f}%", ha="center", va="center", fontsize=8,
                    color="white" if dark else "black",
                )  # fmt: skip
            left += width
    ax.set_yticks(range(len(bars)), [label for label, _ in bars])
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("% of the step, mean of devices")
    ax.set_title(f"{n} step{'s' * (n > 1)} by phase, communication where it is exposed")


def _draw_legend(fig: Any, names: list[str]) -> None:
    patch = pyplot().matplotlib.patches.Patch
    handles = [
        patch(facecolor=_COLORS[name], edgecolor="white", hatch="////", label=name)
        if name == "bubble"
        else patch(facecolor="white" if name == "idle" else _COLORS[name], edgecolor="#999999", label=name)
        for name in names
    ]
    fig.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize="small", frameon=False,
               columnspacing=1.0, handlelength=1.4)  # fmt: skip
