"""What the planner found, in tables: Markdown for people, plain data for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, get_args

from moejax.planner.flops import ceilings, decode_flops, forward_flops
from moejax.planner.predict import Prediction
from moejax.planner.search import Choice, Request, follows_rules
from moejax.planner.work import Phase
from moejax.plots import pyplot

Row = Sequence[Any]
PHASES: tuple[str, ...] = get_args(Phase)


def table(header: Sequence[str], rows: Iterable[Row]) -> str:
    """A Markdown table."""
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    return "\n".join([*lines, *(f"| {' | '.join(map(str, row))} |" for row in rows)])


def layout(prediction: Prediction) -> str:
    """Mesh and choices of a plan in a line."""
    plan = prediction.plan
    mesh, parallel, dispatch = plan.mesh, plan.parallel, plan.dispatch
    sizes = " × ".join(f"{name} {size}" for name, size in mesh.shape.items())
    crossing = [name for name in mesh.shape if mesh.hosts_along(name) > 1]
    across = f" ({' and '.join(crossing)} across hosts)" if crossing else ""
    choices = [f"{sizes}{across}"]
    if mesh.tensor > 1:
        choices.append("experts folded" if "tensor" in dispatch.expert_axes else "experts split")
    if plan.mode != "decode":
        choices.append(f"{parallel.num_microbatches} microbatches")
    if parallel.repeats > 1:
        choices.append(f"{parallel.repeats} repeats")
    if plan.accumulate > 1:
        choices.append(f"{plan.accumulate} accumulated")
    if plan.mode == "train":
        choices += [f"remat {parallel.remat_policy(plan.seq_len)}", f"gather {parallel.gather}"]
        choices += [f"{parallel.batch_split} parts"] if parallel.batch_split > 1 else []
    choices.append(dispatch.strategy)
    choices += [f"{dispatch.chunks} chunks"] if dispatch.chunks > 1 else []
    choices += ["two hops"] if dispatch.hosts > 1 else []
    return ", ".join(choices)


def choice_table(choices: dict[int, Choice]) -> str:
    """One row a length: the plan and its figures."""
    mode = next(iter(choices.values())).best.plan.mode
    step = {"train": "step, s", "prefill": "time to first token, s", "decode": "time per output token, s"}[mode]
    header = (
        "length", "sequences", "plan", "tokens/ms (from, to)", step, "MFU", "HFU", "busy", "exposed", "memory, GB",
    )  # fmt: skip
    rows = []
    for seq_len, choice in choices.items():
        p = choice.best
        t = p.time
        low, high = (p.plan.tokens / s / 1e3 for s in (t.high, t.low))
        rows.append(
            (
                f"{seq_len:,}", p.plan.batch_size, layout(p), f"{p.tokens_per_ms:.1f} ({low:.1f}, {high:.1f})",
                f"{t.expected:.3g}", f"{t.mfu:.0%}", f"{t.hfu:.0%}", f"{t.busy:.0%}",
                f"{t.by_category['communication'] / t.expected:.0%}", f"{p.memory.peak_bytes / 1e9:.1f}",
            )
        )  # fmt: skip
    return table(header, rows)


def memory_table(choices: dict[int, Choice]) -> str:
    """Categories of memory by length, GB a device; what is nothing everywhere is left out."""
    columns = {seq_len: choice.best.memory.categories for seq_len, choice in choices.items()}
    names = [n for n in next(iter(columns.values())) if any(c[n] for c in columns.values())]
    rows: list[Row] = [(name, *(f"{c[name] / 1e9:.2f}" for c in columns.values())) for name in names]
    rows.append(("**peak**", *(f"**{sum(c.values()) / 1e9:.2f}**" for c in columns.values())))
    return table(("memory, GB", *map("{:,}".format, columns)), rows)


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
    """Sentences on one choice: what binds it, what was nearest, what was rejected, what would flip it."""
    best, t = choice.best, choice.best.time
    lines = [
        f"{request.seq_len:,} tokens: {choice.binding} binds; the interval is widest for {t.dominant}. "
        f"{choice.evaluated:,} plans in {choice.seconds:.2f} s."
    ]
    if choice.runner_up:
        lines.append(f"- next mesh, {choice.margin:.1%} slower: {layout(choice.runner_up)}")
    if choice.rejected:
        counts = sorted(choice.rejected.items(), key=lambda item: -item[1])
        text = ", ".join(f"{count:,} for {name}" for name, count in counts)
        lines.append(f"- do not fit in {request.limit_bytes / 1e9:.1f} GB: {text}")
    if choice.unfit and choice.unfit.time.expected < t.expected:
        gain = t.expected / choice.unfit.time.expected - 1
        need = choice.unfit.memory.peak_bytes / 1e9
        lines.append(f"- {gain:.1%} faster with {need:.1f} GB: {layout(choice.unfit)}")
    if best.plan.mode == "train" and not follows_rules(best.plan) and choice.by_rules:
        slower = choice.by_rules.time.expected / t.expected - 1
        rules = choice.by_rules
        lines.append(
            f"- deviates from the rules (remat from 2,048 tokens, tensor from 4,096), which would be {slower:.1%} "
            f"slower at {rules.memory.peak_bytes / 1e9:.1f} GB: {layout(rules)}"
        )
    lines += [
        f"- {flip.constant} {flip.factor:.2f} × ({flip.value:.3g} to {flip.flips_at:.3g}, {flip.kind}) "
        "would make the next mesh the faster"
        for flip in choice.flips[:2]
    ]
    return "\n".join(lines)


def ceiling_lines(request: Request, efficiency: float = 0.55) -> str:
    """What the arithmetic alone allows at that efficiency."""
    flops = decode_flops if request.mode == "decode" else forward_flops
    return str(ceilings(request.cluster, flops(request.model, request.seq_len), efficiency))


def as_data(choice: Choice) -> dict[str, Any]:
    """A choice for JSON: the plan, and its figures with units in the keys."""
    best, t = choice.best, choice.best.time
    return {
        "plan": dataclasses.asdict(best.plan),
        "layout": layout(best),
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
        "runner_up": choice.runner_up and layout(choice.runner_up),
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
    left.set(title="memory at the peak (dashed: what there is)", xlabel="tokens a sequence", ylabel="GB a device")
    right.set(title="time of a step, by phase", xlabel="tokens a sequence", ylabel="part of the step")
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
