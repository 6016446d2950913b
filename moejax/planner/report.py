"""Reports the planner's results: Markdown tables for people, plain data for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from moejax.planner.flops import ceilings, decode_flops, forward_flops
from moejax.planner.predict import Prediction, step_tokens
from moejax.planner.search import REMAT_FROM, TENSOR_FROM, Choice, Flip, Request, follows_rules
from moejax.planner.units import byte_unit, quantity, rounded
from moejax.planner.work import Phase
from moejax.plots import pyplot

Row = Sequence[Any]
PHASES: tuple[str, ...] = get_args(Phase)


def table(header: Sequence[str], rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def describe(prediction: Prediction) -> str:
    """Returns the mesh and the choices of a layout in one line."""
    layout, mode = prediction.layout.resolve(), prediction.mode
    mesh, dispatch = layout.mesh, layout.dispatch
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    crossing = [name for name in mesh.shape if mesh.hosts_along(name) > 1]
    across = f" ({' and '.join(crossing)} across hosts)" if crossing else ""
    choices = [f"{sizes}{across}"]
    if mesh.tensor > 1:
        folded = "tensor" in dispatch.expert_axes
        choices.append("whole experts over expert × tensor" if folded else "every expert split over tensor")
    if mode != "decode":
        choices.append(_counted(layout.num_microbatches, "microbatch", "microbatches"))
    if layout.pipeline_repeats > 1:
        choices.append(f"{layout.pipeline_repeats} repeats")
    if layout.grad_accumulation_steps > 1:
        choices.append(f"{layout.grad_accumulation_steps} accumulated")
    if mode == "train":
        choices += [f"remat {layout.remat}", f"weights gathered per {layout.gather}"]
        choices += [f"batch in {layout.batch_split} parts"] if layout.batch_split > 1 else []
    choices.append(dispatch.strategy)
    choices += [f"exchange in {dispatch.chunks} chunks"] if dispatch.chunks > 1 else []
    choices += ["exchange in two hops"] if dispatch.hierarchical else []
    return ", ".join(choices)


def _counted(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def choice_table(choices: dict[int, Choice]) -> str:
    """Returns one row per length: the plan and its figures."""
    mode = next(iter(choices.values())).best.mode
    step = {"train": "step, s", "prefill": "time to first token, s", "decode": "time per output token, s"}[mode]
    size, unit = byte_unit(max(choice.best.memory.peak_bytes for choice in choices.values()))
    header = (
        "length", "sequences", "plan", "tokens/s (low to high)", "tokens/s per device", step, "MFU", "HFU", "busy",
        "exposed communication", f"memory per device, {unit}",
    )  # fmt: skip
    rows = []
    for seq_len, choice in choices.items():
        p, t = choice.best, choice.best.time
        expected, low, high = (step_tokens(p.layout, p.mode) / seconds for seconds in (t.expected, t.high, t.low))
        rows.append((
            f"{seq_len:,}", p.layout.batch_size, describe(p),
            f"{rounded(expected)} ({rounded(low)} to {rounded(high)})",
            rounded(expected / p.layout.mesh.num_devices), f"{t.expected:.3g}", f"{t.mfu:.0%}", f"{t.hfu:.0%}",
            f"{t.busy:.0%}", f"{t.by_category['communication'] / t.expected:.0%}",
            f"{p.memory.peak_bytes / size:.1f}",
        ))  # fmt: skip
    return table(header, rows)


def memory_table(choices: dict[int, Choice]) -> str:
    """Returns the memory of a device by category and length; what is nothing everywhere is left out."""
    columns = {seq_len: choice.best.memory.categories for seq_len, choice in choices.items()}
    size, unit = byte_unit(max(sum(column.values()) for column in columns.values()))
    names = [n for n in next(iter(columns.values())) if any(c[n] for c in columns.values())]
    rows: list[Row] = [(_words(name), *(f"{c[name] / size:.2f}" for c in columns.values())) for name in names]
    rows.append(("**peak**", *(f"**{sum(c.values()) / size:.2f}**" for c in columns.values())))
    return table((f"memory, {unit}", *map("{:,}".format, columns)), rows)


def _words(category: str) -> str:
    """Returns a category of memory as people call it."""
    return {"optimizer": "optimizer state"}.get(category, category.replace("_", " "))


def time_table(choices: dict[int, Choice]) -> str:
    """Milliseconds of a step by phase, exposed communication included, and by what they are spent on."""
    times = [choice.best.time for choice in choices.values()]
    rows: list[Row] = []
    for title, names in (("by_phase", (*PHASES, "bubble")), ("by_category", tuple(times[0].by_category))):
        for name in names:
            values = [getattr(t, title).get(name, 0.0) for t in times]
            if any(values):
                kind = name if title == "by_phase" else f"*{name}*"
                rows.append((kind, *(f"{1e3 * v:,.1f}" for v in values)))
    rows.append(("**step**", *(f"**{1e3 * t.expected:,.1f}**" for t in times)))
    return table(("time, ms", *map("{:,}".format, choices)), rows)


def why(request: Request, choice: Choice) -> str:
    """Explains a choice: what limits it, what came next, what was rejected, and what would change it."""
    best, t = choice.best, choice.best.time
    lines = [
        f"{request.seq_len:,} tokens: {choice.binding} limits the speed. Largest uncertainty: {t.dominant}. "
        f"Compared {_counted(choice.evaluated, 'plan', 'plans')} in {choice.seconds:.2f} s."
    ]
    if choice.runner_up:
        lines.append(f"- The best plan on another mesh takes {choice.margin:.1%} longer: {describe(choice.runner_up)}")
    if choice.rejected:
        counts = sorted(choice.rejected.items(), key=lambda item: -item[1])
        text = ", ".join(f"{_words(name)} in {count:,}" for name, count in counts)
        number = _counted(sum(choice.rejected.values()), "plan does", "plans do")
        limit = quantity(request.limit_bytes, "B")
        lines.append(f"- {number} not fit in {limit} per device; the largest part is {text}")
    if choice.unfit and choice.unfit.time.expected < t.expected:
        gain = t.expected / choice.unfit.time.expected - 1
        need = quantity(choice.unfit.memory.peak_bytes, "B")
        lines.append(f"- A plan that needs {need} per device would be {gain:.1%} faster: {describe(choice.unfit)}")
    if best.mode == "train" and not follows_rules(best.layout) and choice.by_rules:
        rules = choice.by_rules
        slower = rules.time.expected / t.expected - 1
        lines.append(
            f"- The rule of thumb, full rematerialization from {REMAT_FROM:,} tokens up and a tensor axis from "
            f"{TENSOR_FROM:,} up, takes {slower:.1%} longer and {quantity(rules.memory.peak_bytes, 'B')} per device: "
            f"{describe(rules)}"
        )
    lines += [_flip_line(flip) for flip in choice.flips[:2]]
    return "\n".join(lines)


_FLIPS = {  # constant -> its name and unit
    "matmul_flops": ("the rate of matrix products", "FLOP/s"),
    "copy_bytes_per_s": ("the rate of copies in device memory", "B/s"),
    "inside.bytes_per_s": ("the bandwidth between the devices of a host", "B/s"),
    "across.bytes_per_s": ("the bandwidth between hosts", "B/s"),
    "inside.latency_s": ("the latency between the devices of a host", "s"),
    "launch_s": ("the time to launch an operation", "s"),
}


def _flip_line(flip: Flip) -> str:
    name, unit = _FLIPS[flip.constant]
    return (
        f"- The plan on the other mesh would be faster if {name} were {quantity(flip.flips_at, unit)}; the planner "
        f"takes {quantity(flip.value, unit)} ({flip.kind})"
    )


def ceiling_lines(request: Request, efficiency: float = 0.55) -> str:
    """Returns the throughput that the arithmetic alone allows at that efficiency."""
    flops = decode_flops if request.mode == "decode" else forward_flops
    return str(ceilings(request.cluster, flops(request.model, request.seq_len), efficiency))


def as_data(choice: Choice) -> dict[str, Any]:
    """A choice for JSON: the plan, and its figures with units in the keys."""
    best, t = choice.best, choice.best.time
    return {
        "layout": dataclasses.asdict(best.layout),
        "description": describe(best),
        "tokens_per_ms": best.tokens_per_ms,
        "step_s": t.expected,
        "step_low_s": t.low,
        "step_high_s": t.high,
        "mfu": t.mfu,
        "hfu": t.hfu,
        "busy_fraction": t.busy,
        "exposed_communication_fraction": t.by_category["communication"] / t.expected,
        "bubble_fraction": t.by_category["bubble"] / t.expected,
        "peak_bytes": best.memory.peak_bytes,
        "memory_bytes": best.memory.categories,
        "time_s": {"by_phase": t.by_phase, "by_category": t.by_category},
        "dominant_assumption": t.dominant,
        "binding": choice.binding,
        "runner_up": choice.runner_up and describe(choice.runner_up),
        "margin": choice.margin,
        "rejected_by_memory": choice.rejected,
        "flips": [dataclasses.asdict(flip) for flip in choice.flips],
        "plans_evaluated": choice.evaluated,
        "search_s": choice.seconds,
    }


def figure(choices: dict[int, Choice], limit_bytes: float, title: str) -> Any:
    """A picture of memory by category and of time by phase for each length. Needs matplotlib (extra `plots`)."""
    plt = pyplot()
    lengths = [f"{seq_len:,}" for seq_len in choices]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 5), layout="constrained")
    memory = [{k: v / 1e9 for k, v in choice.best.memory.categories.items()} for choice in choices.values()]
    times = [
        {k: v / choice.best.time.expected for k, v in choice.best.time.by_phase.items()} for choice in choices.values()
    ]
    _stack(left, lengths, memory)
    _stack(right, lengths, times)
    left.axhline(limit_bytes / 1e9, color="black", linewidth=1, linestyle="--")
    left.set_ylim(top=1.05 * max(limit_bytes / 1e9, *(sum(column.values()) for column in memory)))
    left.set(title="memory at the peak (dashed: what there is)", xlabel="tokens per sequence", ylabel="GB per device")
    right.set(title="time of a step, by phase", xlabel="tokens per sequence", ylabel="part of the step")
    fig.suptitle(title)
    return fig


def _stack(ax: Any, labels: list[str], columns: list[dict[str, float]]) -> None:
    """Stacked bars; what is under half a percent of the tallest bar is left out."""
    found = dict.fromkeys(name for column in columns for name in column)
    least = 0.005 * max(sum(column.values()) for column in columns)
    names = [name for name in found if max(column.get(name, 0.0) for column in columns) > least]
    bottom = [0.0] * len(columns)
    for name, color in zip(names, _colors(len(names)), strict=True):
        heights = [column.get(name, 0.0) for column in columns]
        ax.bar(labels, heights, bottom=bottom, label=name, color=color)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    handles, texts = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], texts[::-1], loc="upper left", bbox_to_anchor=(1, 1), fontsize="small", frameon=False)


def _colors(number: int) -> list[Any]:
    plt = pyplot()
    return [plt.get_cmap("tab20")(i % 20) for i in range(number)]
