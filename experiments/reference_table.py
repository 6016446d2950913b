"""The reference model on the reference cluster, as planned, beside the targets: experiments/results/reference.md.

    python experiments/reference_table.py --out=experiments/results/reference.md

`moe_16x10b` on `a100_64gb_2x8` at 128, 1,024, 4,096 and 10,240 tokens: the best training plan of each length, and the
prefill of the same batch for the time to the first token. Nothing was run; every figure is the planner's, with the
inputs of its formula below it. In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

from experiments.shared import loading
from moejax.config import ModelConfig
from moejax.planner import report
from moejax.planner.costs import Assumptions
from moejax.planner.flops import ceilings, forward_flops
from moejax.planner.hardware import Cluster
from moejax.planner.predict import predict_step
from moejax.planner.search import Choice, Request, default_batch_size, find_plan

MODEL, CLUSTER = "moe_16x10b", "a100_64gb_2x8"
LENGTHS = (128, 1024, 4096, 10_240)
# The planner takes it that a whole step sustains 0.8 of a product's rate; the design's 240 TFLOP/s may be that already.
FULL_RATE = Assumptions(sustained=1.0)
SUSTAINED = "the same, if the step sustains 240 TFLOP/s"
TARGETS = {  # figure: target, whether more is better
    "throughput, tokens/ms": (132.0, True),
    SUSTAINED: (132.0, True),
    "time to first token, s": (3.0, False),
    "memory per device, GB": (64.0, False),
    "busy": (0.94, True),
}

FLAGS = loading.Flags(__doc__)
_OUT = FLAGS.define_output("out", "A Markdown file for the table.")


def main(argv: list[str]) -> None:
    FLAGS.parse(argv)
    model, cluster = loading.load_model(MODEL), loading.load_cluster(CLUSTER)
    train = {n: Request(model, cluster, n, default_batch_size(n)) for n in LENGTHS}
    prefill = {n: Request(model, cluster, n, default_batch_size(n), "prefill") for n in LENGTHS}
    trained = {n: find_plan(request) for n, request in train.items()}
    prefilled = {n: find_plan(request) for n, request in prefill.items()}
    text = "\n\n".join([
        f"# {MODEL} on {CLUSTER}, as planned",
        "Closed forms; nothing was run. `python experiments/reference_table.py`.",
        targets_table(model, trained, prefilled, cluster),
        "## Training", report.choice_table(trained), report.memory_table(trained), report.time_table(trained),
        *(report.why(train[n], trained[n]) for n in LENGTHS),
        "## Prefill of the same batch, without queueing", report.choice_table(prefilled),
        "## Ceilings", ceiling_text(cluster, train),
        "## Inputs", inputs(cluster),
    ])  # fmt: skip
    print(text)
    if _OUT.value:
        _OUT.value.write_text(text + "\n")
    figures = {n: figures_of(model, trained[n], prefilled[n], cluster) for n in LENGTHS}
    loading.print_json({"model": MODEL, "cluster": CLUSTER, "figures": figures})


def figures_of(model: ModelConfig, trained: Choice, prefilled: Choice, cluster: Cluster) -> dict[str, float]:
    """The figures that have targets, and exposed communication."""
    t, layout = trained.best.time, trained.best.layout
    return {
        "throughput, tokens/ms": trained.best.tokens_per_ms,
        SUSTAINED: layout.tokens / predict_step(model, layout, cluster, FULL_RATE).expected / 1e3,
        "time to first token, s": prefilled.best.time.expected,
        "memory per device, GB": trained.best.memory.peak_bytes / 1e9,
        "busy": t.busy,
        "exposed communication": t.by_category["communication"] / t.expected,
    }


def targets_table(
    model: ModelConfig, trained: dict[int, Choice], prefilled: dict[int, Choice], cluster: Cluster
) -> str:
    """Every length's figures; what misses its target says so."""
    figures = {n: figures_of(model, trained[n], prefilled[n], cluster) for n in LENGTHS}
    rows = []
    for name in figures[LENGTHS[0]]:
        target, more = TARGETS.get(name, (None, True))
        cells = []
        for n in LENGTHS:
            value = figures[n][name]
            missed = target is not None and (value < target if more else value > target)
            cells.append(show(name, value) + (" (missed)" if missed else ""))
        goal = "" if target is None else f"{'≥' if more else '<'} {show(name, target)}"
        rows.append((name, goal, *cells))
    return report.table(("figure", "target", *map("{:,}".format, LENGTHS)), rows)


def show(name: str, value: float) -> str:
    """With the digits that mean something."""
    return f"{value:.0%}" if name in ("busy", "exposed communication") else f"{value:.3g}"


def ceiling_text(cluster: Cluster, requests: dict[int, Request]) -> str:
    """The ceilings at 4 GFLOP a token, as the design has them, and at each length's own FLOPs."""
    lines = [f"- at 4 GFLOP: {ceilings(cluster, 4e9)}"]
    lines += [f"- {n:,} tokens: {ceilings(cluster, forward_flops(r.model, n))}" for n, r in requests.items()]
    return "\n".join(lines)


def inputs(cluster: Cluster) -> str:
    """The device's figures with their sources, and the assumptions of the time model."""
    device = cluster.device
    figures = {
        "bfloat16, achievable, FLOP/s": device.matmul_flops,
        "bfloat16, data sheet, FLOP/s": device.peak_flops,
        "memory, bytes": device.memory_bytes,
        "reserved, bytes": device.reserved_bytes,
        "copy, bytes/s": device.copy_bytes_per_s,
        "inside a host, bytes/s": device.inside.bytes_per_s,
        "inside a host, s": device.inside.latency_s,
        "across hosts, bytes/s": device.across.bytes_per_s,
        "across hosts, s": device.across.latency_s,
        "an operation, s": device.launch_s,
    }
    rows = [(name, f"{float(value):.4g}", value.kind, value.source) for name, value in figures.items()]
    assumed = ", ".join(f"{name} {value:.3g}" for name, value in vars(Assumptions()).items())
    return f"{report.table(('figure', 'value', 'kind', 'source'), rows)}\n\nAssumptions (see `Assumptions`): {assumed}."


if __name__ == "__main__":
    loading.run(main, FLAGS)
