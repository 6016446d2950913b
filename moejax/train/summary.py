"""What a run came to: the times of its steps while it runs, and its summary at the end."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from pathlib import Path

from moejax.mesh import MeshConfig
from moejax.train.sample import Sample
from moejax.train.schedule import Schedule
from moejax.train.sizes import StepSizes

FROM_METRICS = (  # of the last step, or of the window that ends with it: fields of `Summary`
    "loss", "eval_loss", "eval_bits_per_byte", "window_tokens", "window_load_cv", "window_load_cv_worst",
    "window_load_cv_floor", "window_load_max_over_mean_worst", "window_dropped_fraction", "window_rounds",
    "window_idle_experts", "capacity_factor",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BucketSummary:
    """The steps of one length, as they ran: after the memory guard. Times are medians, as in `Summary`."""

    seq_len: int
    batch_size: int
    mesh: dict[str, int]
    remat: str
    num_microbatches: int
    grad_accumulation_steps: int
    steps: int
    step_seconds: float
    tokens_per_second: float
    device_memory_bytes: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to. Seconds are wall clock; losses are nats per token, or bits per byte of text.

    `step_seconds` is the median; with several buckets their medians' mean, each counted as often as it was drawn. The
    figures from `window_tokens` to `window_idle_experts` are over so many of the last tokens (see
    `moejax.balance.BalanceReport`); `capacity_factor` is the size of the dispatch's buffers in the last step, and
    `capacity_seconds_waited` what the switches to other sizes, and first uses of further buckets, cost. `reshards`
    counts moves of the state between meshes, and `reshard_seconds` is what they took in all.
    """

    step: int
    resumed_from: int
    interrupted: bool
    loss: float
    eval_loss: float
    eval_bits_per_byte: float
    tokens_per_second: float
    step_seconds: float
    first_step_seconds: float
    total_seconds: float
    window_tokens: float
    window_load_cv: float
    window_load_cv_worst: float
    window_load_cv_floor: float
    window_load_max_over_mean_worst: float
    window_dropped_fraction: float
    window_rounds: float
    window_idle_experts: float
    capacity_factor: float
    capacity_switches: int
    capacity_seconds_waited: float
    device_memory_bytes: int
    reshards: int
    reshard_seconds: float
    buckets: tuple[BucketSummary, ...]
    sample: Sample | None


def report(summary: Summary, steps: int, workdir: Path, mesh: MeshConfig) -> list[str]:
    """Returns the lines that end a run's output for people.

    Args:
        summary: of the run.
        steps: that it was to have.
        workdir: of the run.
        mesh: that it ran on.
    """
    rows = describe(summary)
    columns = max(map(len, rows))
    lines = ["", f"step {summary.step} of {steps}", *(f"  {label:<{columns}}  {rows[label]}" for label in rows)]
    if mesh.hardware == "cpu" and mesh.num_devices > 1:
        lines.append(
            f"{mesh.num_devices} virtual devices share this machine's cores to show the sharded program; "
            "--mesh=single trains about twice as fast here"
        )
    if summary.sample is not None:
        lines += ["", "sample, the prompt (held-out text):", summary.sample.prompt]
        lines += ["", "sample, how the model continues it:", summary.sample.continuation, ""]
    if summary.interrupted:
        lines.append(f"stopped and saved; go on with --workdir={workdir}")
    elif summary.resumed_from >= steps:
        lines.append(f"{workdir} was trained already; for more, raise --config.steps or use another --workdir")
    return lines


def describe(summary: Summary) -> dict[str, str]:
    """Returns the rows of a summary for people: a label in plain words, and the figures.

    Left out is what the run has no figure for, such as the held-out loss of a run that was stopped early.
    """
    rows = {
        "held-out loss": f"{summary.eval_bits_per_byte:.3f} bits per byte of text (lower is better)",
        "training loss": f"{summary.loss:.3f} nats per token, in the last step",
        "speed": f"{summary.tokens_per_second:,.0f} tokens/s, {summary.step_seconds:.3f} s per step",
        "time to first step": f"{summary.first_step_seconds:.1f} s",
        "total time": f"{summary.total_seconds:.0f} s",
        "unevenness of expert load": f"CV {summary.window_load_cv:.3f} over {summary.window_tokens:,.0f} tokens "
        f"(chance: {summary.window_load_cv_floor:.3f})",
        "load of busiest expert": f"{summary.window_load_max_over_mean_worst:.2f} times the mean",
        "dropped by full experts": f"{summary.window_dropped_fraction:.2%} of assignments",
        "rounds to deliver tokens": f"{summary.window_rounds:.2f} on average (1 is best)",
        "size of expert buffers": f"{summary.capacity_factor:g} times the mean load; "
        f"changes: {summary.capacity_switches}, in {summary.capacity_seconds_waited:.1f} s",
        "memory per device": f"{summary.device_memory_bytes / 2**20:.0f} MiB, as compiled",
    }
    if len(summary.buckets) > 1:
        rows["moves between meshes"] = f"{summary.reshards} in {summary.reshard_seconds:.1f} s"
    for bucket in summary.buckets if len(summary.buckets) > 1 else ():
        mesh = " × ".join(f"{axis} {size}" for axis, size in bucket.mesh.items())
        rows[f"{bucket.batch_size} × {bucket.seq_len:,} tokens"] = (
            f"{bucket.steps} steps of {bucket.step_seconds:.2f} s, {bucket.tokens_per_second:,.0f} tokens/s, "
            f"{mesh}, remat {bucket.remat}, {bucket.device_memory_bytes / 2**20:.0f} MiB"
        )
    return {label: figures for label, figures in rows.items() if "nan" not in figures}


class Timing:
    """Seconds of each step by bucket, and of everything up to the end of the first; and what they ran with."""

    def __init__(self, sizes: StepSizes, schedule: Schedule) -> None:
        self.sizes, self.schedule, self.first_step = sizes, schedule, math.nan
        self._steps: list[list[float]] = [[] for _ in schedule.layouts]

    def add(self, bucket: int, seconds: float, since: float) -> None:
        if not any(self._steps):
            self.first_step = time.perf_counter() - since
        self._steps[bucket].append(seconds)

    @property
    def step_seconds(self) -> float:
        times = [(len(steps), _median(steps)) for steps in self._steps if steps]
        return sum(n * median for n, median in times) / sum(n for n, _ in times) if times else math.nan

    @property
    def tokens_per_second(self) -> float:
        counts = list(map(len, self._steps))
        tokens = sum(n * layout.tokens for n, layout in zip(counts, self.schedule.layouts, strict=True))
        return tokens / sum(counts) / self.step_seconds if any(counts) else math.nan

    def buckets(self) -> tuple[BucketSummary, ...]:
        """Of the buckets that were drawn."""
        return tuple(self._bucket(i) for i, steps in enumerate(self._steps) if steps)

    def _bucket(self, bucket: int) -> BucketSummary:
        steps = self._steps[bucket]
        used = [step for (which, _), step in self.sizes.used.items() if which == bucket]
        layout, median = used[-1].step.program.resolved, _median(steps)
        return BucketSummary(
            seq_len=layout.seq_len,
            batch_size=layout.batch_size,
            mesh=dict(layout.mesh.shape),
            remat=layout.remat,
            num_microbatches=layout.num_microbatches,
            grad_accumulation_steps=layout.grad_accumulation_steps,
            steps=len(steps),
            step_seconds=median,
            tokens_per_second=layout.tokens / median,
            device_memory_bytes=max(step.memory.total for step in used),
        )


def _median(seconds: list[float]) -> float:
    """Of the steps after the first, which warms up."""
    return statistics.median(seconds[1:] or seconds)
