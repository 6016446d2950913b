"""Trains a sparse Mixture-of-Experts model, by default a tiny one on Python's own sources on 16 virtual CPU devices.

    python experiments/train.py
    python experiments/train.py --config=small --data=~/texts --tokenizer=bpe
    python experiments/train.py --config.model.num_layers=8 --mesh=cpu_16_expert --config.data.batch_size=32
    python experiments/train.py --config=mixed --mesh=cpu_16_mixed     # a plan: lengths mixed, each on its own mesh

A run that was stopped goes on, as what it was, when it is started again with its --workdir and nothing else. Flags that
differ from its record are printed; those that would make it another run are refused without --override.

`--profile_steps=10:13` traces steps 10, 11 and 12; `echo 3 > WORKDIR/profile` has a run that goes on already trace its
next three. For what a trace says see experiments/read_trace.py.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":  # what is imported next takes seconds
    print("starting JAX", file=sys.stderr, flush=True)

from absl import flags, logging

from experiments.shared import loading, resuming
from moejax.config import TrainConfig
from moejax.mesh import MeshConfig, build_mesh
from moejax.planner import DEVICES, Plan, predict
from moejax.profiling.capture import StepCapture, parse_steps
from moejax.train.loop import Trainer
from moejax.train.progress import make_console
from moejax.train.schedule import Bucket
from moejax.train.summary import report

FLAGS = resuming.RunFlags(
    __doc__,
    first={"workdir": "runs/a", "config": "small", "mesh": "single", "data": "~/texts", "config.steps": "1000"},
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Steps to trace, first:end; 10:13 is 10, 11 and 12.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    config, mesh_config = FLAGS.parse_configs(argv)
    buckets = FLAGS.plan_buckets()
    refuse_what_cannot_fit(config, mesh_config, buckets)
    profiled = range(0) if _PROFILE_STEPS.value is None else parse_steps(_PROFILE_STEPS.value, config.steps)
    FLAGS.setup_jax(mesh_config)
    mesh = build_mesh(mesh_config)
    workdir = FLAGS.workdir or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    console = make_console()
    console.print(f"mesh {dict(mesh_config.shape)} on {mesh_config.hardware}, workdir {workdir}")
    meshes = [bucket.mesh for bucket in buckets] or [mesh_config]
    with StepCapture(workdir, meshes, profiled) as profiler:
        trainer = Trainer(
            config, mesh, workdir, buckets, profiler.step, mesh_config=mesh_config, override=FLAGS.override
        )
        summary = trainer.run()
    console.print("\n".join(report(summary, config.steps, workdir, mesh_config)))
    loading.print_json(dataclasses.asdict(summary))


def refuse_what_cannot_fit(config: TrainConfig, mesh: MeshConfig, buckets: Sequence[Bucket]) -> None:
    """Checks sizes against the mesh, and on accelerators the predicted memory against the devices', before any work.

    Raises:
        ConfigError: a size that must be a multiple of the mesh's is not.
        DoesNotFitError: a bucket, or the run of one length, is predicted not to fit however it is cut.
    """
    device = None if mesh.hardware == "cpu" else DEVICES.get(mesh.hardware)
    data = config.data
    one = Bucket(data.seq_len, data.batch_size, mesh, config.parallel, config.dispatch, config.accumulate)
    for b in buckets or (one,):
        plan = Plan(config.model, b.mesh, b.seq_len, b.batch_size, b.parallel, b.dispatch, b.accumulate)
        predict.check(plan)
        if device is None:
            continue
        limit = config.memory_limit_bytes or device.usable_bytes
        if not predict.check_fits(plan, limit):
            logging.warning(
                "%d sequences of %d tokens are predicted not to fit in %.1f GB as they are; the memory guard will step "
                "down. experiments/plan.py finds a plan that fits.", b.batch_size, b.seq_len, limit / 1e9,
            )  # fmt: skip


if __name__ == "__main__":
    loading.run(main, FLAGS)
