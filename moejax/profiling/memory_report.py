"""Tables, plain data and a picture of what a step takes memory for, beside the planner's prediction."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from moejax.planner.hardware import Device
from moejax.planner.memory import Memory
from moejax.planner.report import table
from moejax.plots import pyplot
from moejax.profiling.memory import CONTENTS, WHOLE_TIME, Buffer, StepMemory
from moejax.profiling.phases import PHASES, UNNAMED

# Which of the prediction's categories hold what.
PREDICTED = {
    "parameters": ("parameters",),
    "moments": ("optimizer",),
    "batch": ("batch",),
    "gradients": ("gradients",),
    "copies of weights": ("compute_copies",),
    "saved activations": ("activations",),
    "working memory": ("dispatch_buffers", "workspace", "logits", "kv_cache", "temporaries"),
}
_LEAST_SHARE = 0.01  # of the peak: groups that never reach it are drawn as one
_OFF_SCALE = 2.5  # times the peak: a limit above that would leave the picture empty
_REST = "everything else"


def as_data(memory: StepMemory, predicted: Memory, device: Device, num_largest: int) -> dict[str, Any]:
    """The figures for JSON, bytes of one device."""
    names = ("num_bytes", "shape", "group", "backward", "content", "name", "words")
    phase, backward = memory.running[memory.peak] if memory.running else (None, None)
    return {
        "platform": memory.platform,
        "peak_bytes": memory.peak_bytes,
        "reported_bytes": memory.reported_bytes,
        "hole_bytes": memory.hole_bytes,
        "total_bytes": memory.total_bytes,
        "reported_total_bytes": _sum_reported(memory),
        "predicted_bytes": predicted.peak_bytes,
        "device_bytes": float(device.memory_bytes),
        "usable_bytes": device.usable_bytes,
        "peak_moment": memory.peak,
        "num_moments": len(memory.moments),
        "peak_phase": phase,
        "peak_backward": backward,
        "by_phase_bytes": {name: size for name, (size, _) in memory.by_group().items()},
        "by_phase_backward_bytes": {name: size for name, (_, size) in memory.by_group().items()},
        "by_content_bytes": {name: size for name, (size, _) in memory.by_content().items()},
        "predicted_by_category_bytes": predicted.categories,
        "largest": [
            {name: getattr(b, name) for name in names} for b in memory.at_peak()[:num_largest]
        ],
    }  # fmt: skip


def as_markdown(memory: StepMemory, predicted: Memory, device: Device, num_largest: int) -> str:
    """All tables."""
    parts = [_head(memory), _peak_table(memory, predicted, device), _group_table(memory)]
    parts += [_content_table(memory, predicted), _largest_table(memory, num_largest)]
    return "\n\n".join(parts)


def _head(memory: StepMemory) -> str:
    if not memory.moments:
        return "The program takes no temporary memory."
    phase, backward = memory.running[memory.peak]
    at = f"moment {memory.peak + 1:,} of {len(memory.moments):,} of the schedule"
    return f"The peak is at {at}, when {phase} runs in the {'backward' if backward else 'forward'} pass."


def _peak_table(memory: StepMemory, predicted: Memory, device: Device) -> str:
    peak, unit = memory.peak_bytes, _unit(memory)
    own = (
        "arguments + outputs + temporaries + constants - holes" if memory.platform == "cpu" else "peak_memory_in_bytes"
    )
    known = {
        "live at the peak": peak,
        f"the same by XLA's count: {own}": memory.reported_bytes,
        "with holes between temporaries": memory.total_bytes,
        "arguments + outputs + temporaries by XLA's count": _sum_reported(memory),
        f"predicted by the planner, its peak in the {predicted.moment}": predicted.peak_bytes,
    }
    rows = [(name, _in(size, unit), f"{size / peak - 1:+.1%}") for name, size in known.items()]
    limits = {"memory of the device": float(device.memory_bytes), "of it usable": device.usable_bytes}
    rows += [(f"{name} ({device.name})", _in(size, unit), f"{peak / size:.1%} taken") for name, size in limits.items()]
    return table((f"{unit[0]} a device", "", "against the peak"), rows)


def _sum_reported(memory: StepMemory) -> int:
    """What the memory guard goes by. On TPU it is more than the buffers and their holes come to (v5p: by 2.5 GB)."""
    return memory.reported.arguments + memory.reported.outputs + memory.reported.temporaries


def _group_table(memory: StepMemory) -> str:
    unit = _unit(memory)
    rows = [
        (name, _in(size, unit), f"{size / memory.peak_bytes:.1%}", _in(backward, unit))
        for name, (size, backward) in _shown(memory, memory.by_group()).items()
    ]
    rows.append(("**peak**", f"**{_in(memory.peak_bytes, unit)}**", "", ""))
    return table(("live at the peak, by phase", unit[0], "of the peak", "of it made in the backward pass"), rows)


def _shown(memory: StepMemory, sums: dict[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """Sums with those that round to nothing added up as one."""
    shown = {name: sizes for name, sizes in sums.items() if sizes[0] >= 0.0005 * memory.peak_bytes}
    rest = [sizes for name, sizes in sums.items() if name not in shown]
    return shown | {_REST: (sum(size for size, _ in rest), sum(size for _, size in rest))}


def _content_table(memory: StepMemory, predicted: Memory) -> str:
    """The planner's categories are its own: it counts what one layer works with as `workspace` and `temporaries`."""
    unit, categories = _unit(memory), predicted.categories
    rows = []
    for name, (size, _) in _shown(memory, memory.by_content()).items():
        parts = {part: categories[part] for part in PREDICTED.get(name, ()) if categories[part]}
        words = ", ".join(f"{part.replace('_', ' ')} {_in(value, unit)}" for part, value in parts.items())
        rows.append((name, _in(size, unit), _in(sum(parts.values()), unit) if parts else "", words))
    rows.append(("**peak**", f"**{_in(memory.peak_bytes, unit)}**", f"**{_in(predicted.peak_bytes, unit)}**", ""))
    return table(("live at the peak, by what it is", unit[0], "predicted", "of which"), rows)


def _largest_table(memory: StepMemory, number: int) -> str:
    rows = [
        (f"{b.num_bytes / 1e6:,.2f}", f"`{b.shape}`", _phase(b), b.content, b.words, f"`{b.name}`")
        for b in memory.at_peak()[:number]
    ]
    return table(("MB", "shape", "phase", "what it is", "in words", "instruction or argument"), rows)


def _phase(buffer: Buffer) -> str:
    return "" if buffer.group in WHOLE_TIME else buffer.group + ", backward" * buffer.backward


def _unit(memory: StepMemory) -> tuple[str, float]:
    """GB, or MB for what is small."""
    return ("GB", 1e9) if memory.peak_bytes >= 1e9 else ("MB", 1e6)


def _in(size: float, unit: tuple[str, float]) -> str:
    return f"{size / unit[1]:,.3f}"


def figure(memory: StepMemory, device: Device, title: str, num_largest: int = 15) -> Any:
    """A picture: what is live over the schedule, by phase and by what it is, with the peak and the device's limit; and
    the largest buffers at the peak.

    Returns:
      A `matplotlib.figure.Figure`.

    Raises:
      ConfigError: matplotlib is not installed.
    """
    largest = memory.at_peak()[:num_largest]
    heights = (4.4, 4.4, 1.2 + 0.28 * len(largest))  # inches
    fig = pyplot().figure(figsize=(14, sum(heights)), layout="constrained")
    fig.suptitle(title)
    fig.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    by_phase, by_content, bars = fig.subfigures(3, 1, height_ratios=heights)
    _draw_schedule(by_phase.subplots(), memory, device, "group", "live over the schedule, by the phase that made it")
    _draw_schedule(by_content.subplots(), memory, device, "content", "live over the schedule, by what it is")
    _draw_largest(bars.subplots(), memory, largest)
    return fig


def _draw_schedule(ax: Any, memory: StepMemory, device: Device, field: Literal["group", "content"], title: str) -> None:
    unit, size = _unit(memory)
    _draw_stack(ax, {name: live / size for name, live in memory.over_schedule(field).items()})
    for first, end in _backward_spans(memory):
        ax.axvspan(first, end, ymax=0.015, color="black", linewidth=0)
    ax.plot([], [], color="black", linewidth=3, label="the backward pass runs")
    peak, limit = memory.peak_bytes / size, device.usable_bytes / size
    ax.axvline(memory.peak, color="black", linewidth=0.8, linestyle=":")
    ax.axhline(peak, color="black", linewidth=0.8, linestyle=":", label=f"peak: {peak:,.2f} {unit}")
    shown = limit < _OFF_SCALE * peak
    if shown:
        ax.axhline(limit, color="tab:red", linestyle="--", label=f"limit of {device.name}: {limit:,.1f} {unit}")
    else:
        ax.plot([], [], " ", label=f"limit of {device.name}: {limit:,.1f} {unit}, off the scale")
    ax.set(xlim=(0, max(len(memory.moments), 1)), ylim=(0, 1.08 * max(peak, limit * shown)), title=title)
    ax.set(xlabel="moments of the schedule: memory is taken or given back (a loop's body is there once)")
    ax.set_ylabel(f"{unit} live on a device")
    ax.xaxis.set_major_formatter("{x:,.0f}")
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], labels[::-1], loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small", frameon=False)


def _draw_stack(ax: Any, series: dict[str, np.ndarray]) -> None:
    """Areas one on the other; those that are never a hundredth of the highest point are drawn as one."""
    least = _LEAST_SHARE * np.sum([*series.values()], axis=0).max()
    shown = {name: live for name, live in series.items() if live.max() >= least}
    rest = [live for name, live in series.items() if name not in shown]
    shown |= {_REST: np.sum(rest, axis=0)} if rest else {}
    edges = np.arange(len(next(iter(series.values()))) + 1)
    columns = [np.append(live, live[-1]) for live in shown.values()]
    ax.stackplot(edges, *columns, labels=shown, colors=[_color(name) for name in shown], step="post", linewidth=0)


def _draw_largest(ax: Any, memory: StepMemory, largest: list[Buffer]) -> None:
    unit, size = _unit(memory)
    widths = [b.num_bytes / size for b in largest]
    ax.barh(range(len(largest)), widths, color=[_color(b.content) for b in largest])
    ax.set_yticks(range(len(largest)), labels=[_label(b) for b in largest], fontsize=8)
    ax.invert_yaxis()
    ax.set(xlabel=unit, title=f"the {len(largest)} largest buffers at the peak, colored by what they are")
    for place, (b, width) in enumerate(zip(largest, widths, strict=True)):
        ax.text(width, place, f" {width:,.3f}  {_phase(b) or b.group}", va="center", fontsize=8)
    ax.set_xlim(0, 1.35 * max(widths))


def _label(buffer: Buffer) -> str:
    """What it is, in one line of the picture."""
    words = buffer.name if buffer.group in WHOLE_TIME else f"{buffer.content}: {buffer.words or buffer.name}"
    words = words if len(words) <= 84 else f"{words[:83]}…"
    return f"{words}  {buffer.shape}"


def _backward_spans(memory: StepMemory) -> list[tuple[int, int]]:
    """Ranges of moments at which the backward pass runs; what has no phase goes on with what ran before."""
    spans: list[tuple[int, int]] = []
    on, first = False, 0
    for moment, (phase, backward) in enumerate([*memory.running, ("", False)]):
        if phase in PHASES or backward or not phase:
            if on and not backward:
                spans.append((first, moment))
            first = moment if backward and not on else first
            on = backward
    return spans


def _color(name: str) -> Any:
    """Of a phase or a content, the same in every picture: grays for what is there all the time."""
    plt = pyplot()
    if name in WHOLE_TIME:
        return plt.get_cmap("Greys")(0.75 - 0.22 * (WHOLE_TIME.index(name) % 3))
    if name in PHASES:
        return plt.get_cmap("tab20")(PHASES.index(name))
    names = [*CONTENTS[len(WHOLE_TIME) :], UNNAMED, _REST]
    return plt.get_cmap("Set2")(names.index(name))
