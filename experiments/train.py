"""Trains a sparse Mixture-of-Experts model, by default a tiny one on Python's own sources on 16 virtual CPU devices.

    python experiments/train.py
    python experiments/train.py --config=small --data=~/texts --tokenizer=bpe
    python experiments/train.py --config.model.num_layers=8 --mesh=cpu_16_expert --workdir=runs/deep
    python experiments/train.py --config=mixed --mesh=cpu_16_mixed     # a plan: lengths mixed, each on its own mesh

A run that was stopped goes on where it was when it is started again with its --workdir. `--profile_steps=10:13` traces
steps 10, 11 and 12; `echo 3 > WORKDIR/profile` has a run that goes on already trace its next three. For what a trace
says see experiments/profile.py.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import common
import loading
from absl import flags, logging
from rich.console import Console
from rich.table import Table

from moejax.config import TrainConfig
from moejax.mesh import MeshConfig, build_mesh
from moejax.planner import DEVICES, Plan
from moejax.planner.predict import check_fits
from moejax.profiling.capture import StepCapture, parse_steps
from moejax.train.loop import Summary, Trainer
from moejax.train.schedule import Bucket

FLAGS = common.ConfigFlags(
    __doc__,
    first={"workdir": "runs/a", "config": "small", "mesh": "single", "data": "~/texts", "config.steps": "1000"},
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Steps to trace, first:end; 10:13 is 10, 11 and 12.", flag_values=FLAGS
)
_WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "Where checkpoints and metrics go; an existing run is resumed. Default: a new folder in runs/.",
    flag_values=FLAGS,
)


def main(argv: list[str]) -> None:
    config, mesh_config = FLAGS.parse_configs(argv)
    buckets = FLAGS.plan_buckets()
    refuse_what_cannot_fit(config, mesh_config, buckets)
    profiled = range(0) if _PROFILE_STEPS.value is None else parse_steps(_PROFILE_STEPS.value, config.steps)
    FLAGS.setup_jax(mesh_config)
    mesh = build_mesh(mesh_config)
    workdir = Path(_WORKDIR.value or f"runs/{time.strftime('%Y%m%d-%H%M%S')}").expanduser()
    console = Console(stderr=True)
    console.print(f"mesh {dict(mesh_config.shape)} on {mesh_config.hardware}, workdir {workdir}", highlight=False)
    meshes = [bucket.mesh for bucket in buckets] or [mesh_config]
    with StepCapture(workdir, meshes, profiled) as profiler:
        summary = Trainer(config, mesh, workdir, buckets, profiler.step).run()
    show(summary, config.steps, workdir, console)
    loading.print_json(dataclasses.asdict(summary))


def refuse_what_cannot_fit(config: TrainConfig, mesh: MeshConfig, buckets: Sequence[Bucket]) -> None:
    """Holds what the planner predicts against the devices' memory, before anything starts. It knows accelerators only.

    Raises:
        DoesNotFitError: a bucket, or the run of one length, is predicted not to fit however it is cut.
    """
    if mesh.hardware not in DEVICES or mesh.hardware == "cpu":
        return
    limit = config.memory_limit_bytes or DEVICES[mesh.hardware].usable_bytes
    data = config.data
    one = Bucket(data.seq_len, data.batch_size, mesh, config.parallel, config.dispatch, config.accumulate)
    for b in buckets or (one,):
        plan = Plan(config.model, b.mesh, b.seq_len, b.batch_size, b.parallel, b.dispatch, b.accumulate)
        if not check_fits(plan, limit):
            logging.warning(
                "%d sequences of %d tokens are predicted not to fit in %.1f GB as they are; the memory guard will step "
                "down. experiments/plan.py finds a plan that fits.", b.batch_size, b.seq_len, limit / 1e9,
            )  # fmt: skip


def show(summary: Summary, steps: int, workdir: Path, console: Console) -> None:
    """The summary for people; the JSON line on standard output is for programs."""
    table = Table(title=f"step {summary.step} of {steps}", show_header=False)
    rows = {
        "held-out bits per byte": f"{summary.eval_bits_per_byte:.3f}",
        "loss": f"{summary.loss:.3f}",
        "tokens/s": f"{summary.tokens_per_second:,.0f}",
        "step": f"{summary.step_seconds:.3f} s",
        "first step after": f"{summary.first_step_seconds:.1f} s",
        "in all": f"{summary.total_seconds:.0f} s",
        "load CV": f"{summary.window_load_cv:.3f} over {summary.window_tokens:,.0f} tokens "
        f"(sampling floor {summary.window_load_cv_floor:.3f})",
        "busiest expert": f"{summary.window_load_max_over_mean_worst:.2f} × mean",
        "dropped": f"{summary.window_dropped_fraction:.2%} of assignments",
        "rounds": f"{summary.window_rounds:.2f} of capacity {summary.capacity_factor:g}, "
        f"{summary.capacity_switches} switches waited {summary.capacity_seconds_waited:.1f} s",
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
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    if summary.sample is not None:
        console.rule("sample")
        console.print(summary.sample, markup=False, highlight=False)
        console.rule()
    if summary.interrupted:
        console.print(f"stopped and saved; go on with --workdir={workdir}", highlight=False)
    elif summary.resumed_from >= steps:
        console.print(f"{workdir} was trained already; for more, raise --config.steps or use another --workdir")


if __name__ == "__main__":
    loading.run(main, FLAGS)
