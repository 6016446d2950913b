"""Trains a sparse Mixture-of-Experts model, by default a tiny one on Python's own sources on 16 virtual CPU devices.

    python experiments/train.py
    python experiments/train.py --config=small --data=~/texts --tokenizer=bpe
    python experiments/train.py --config.model.num_layers=8 --mesh=cpu_16_expert --config.layout.batch_size=32
    python experiments/train.py --init=~/models/mixtral --data=~/texts  # a Hugging Face checkpoint's model and weights
    python experiments/train.py --config=mixed --plan=cpu_16_mixed     # a plan: lengths mixed, each on its own mesh

A run that was stopped goes on, as what it was, when it is started again with its --workdir and nothing else. Flags that
differ from its record are printed; those that would make it another run are refused without --override.

`--profile_steps=10:13` traces steps 10, 11 and 12; `echo 3 > WORKDIR/profile` has a run that goes on already trace its
next three. For what a trace says see experiments/read_trace.py.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from pathlib import Path

if __name__ == "__main__":  # what is imported next takes seconds
    print("starting JAX", file=sys.stderr, flush=True)

from absl import flags, logging

from experiments.shared import loading, resuming
from moejax.mesh import build_mesh
from moejax.planner import DEVICES, predict
from moejax.profiling.capture import StepCapture, parse_steps
from moejax.train.config import TrainConfig
from moejax.train.loop import Trainer
from moejax.train.progress import make_console
from moejax.train.summary import report

FLAGS = resuming.RunFlags(
    __doc__,
    first={"workdir": "runs/a", "config": "small", "mesh": "single", "data": "~/texts", "config.steps": "1000"},
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Steps to trace, first:end; 10:13 is 10, 11 and 12.", flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    config = FLAGS.parse_config(argv)
    refuse_what_cannot_fit(config)
    profiled = range(0) if _PROFILE_STEPS.value is None else parse_steps(_PROFILE_STEPS.value, config.steps)
    mesh = config.layouts[0].mesh
    FLAGS.setup_jax(mesh)
    build_mesh(mesh)  # other devices are refused before the headline
    workdir = FLAGS.workdir or Path("runs", time.strftime("%Y%m%d-%H%M%S"))
    console = make_console()
    console.print(f"mesh {dict(mesh.shape)} on {mesh.hardware}, workdir {workdir}")
    with StepCapture(workdir, profiled) as profiler:
        summary = Trainer(config, workdir, profiler.step, override=FLAGS.override).run()
    console.print("\n".join(report(summary, config.steps, workdir, mesh)))
    loading.print_json(dataclasses.asdict(summary))


def refuse_what_cannot_fit(config: TrainConfig) -> None:
    """Checks sizes against the mesh, and on accelerators the predicted memory against the devices', before any work.

    Raises:
        ConfigError: a size that must be a multiple of the mesh's is not.
        DoesNotFitError: a layout is predicted not to fit however it is cut.
    """
    config.check_fits()
    for layout in config.layouts:
        device = None if layout.mesh.platform == "cpu" else DEVICES.get(layout.mesh.hardware)
        if device is None:
            continue
        limit = config.memory_limit_bytes or device.usable_bytes
        if not predict.check_fits(config.model, layout, limit):
            logging.warning(
                "%d sequences of %d tokens are predicted not to fit in %.1f GB as they are; the memory guard will step "
                "down. experiments/plan.py finds a plan that fits.", layout.batch_size, layout.seq_len, limit / 1e9,
            )  # fmt: skip


if __name__ == "__main__":
    loading.run(main, FLAGS)
