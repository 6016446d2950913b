"""Traces and compiles a step for 16 H100s that are not there: `compiled_ahead_of_time.py LAYOUT`, one of `LAYOUTS`.

A process of its own, for the compiler reads its environment when it is loaded. Prints one line of JSON.
"""

import dataclasses
import json
import sys

from moejax.config import DispatchConfig, ParallelConfig
from moejax.mesh import MeshConfig, build_mesh
from moejax.model import Program
from moejax.planner.compiled import against_trace, compiled_counts
from moejax.planner.plan import Plan
from moejax.presets import moe_16x10b
from moejax.topology import compile_only_devices
from moejax.train.step import make_train_step


def mesh(**sizes):
    return MeshConfig(**sizes, hardware="h100")


MODEL = dataclasses.replace(moe_16x10b(), num_layers=8)
LAYOUTS = {
    "pipeline": Plan(moe_16x10b(), mesh(expert=8, pipeline=2), 1024, 64, ParallelConfig(remat="full", gather="layer")),
    "kept": Plan(MODEL, mesh(expert=8, pipeline=2), 1024, 64, ParallelConfig(remat="none", gather="step")),
    "all axes": Plan(
        MODEL, mesh(expert=4, pipeline=2, tensor=2, hosts=2), 1024, 64, ParallelConfig(remat="minimal", repeats=2),
        DispatchConfig(hosts=2, chunks=2),
    ),
    "split experts": Plan(
        MODEL, mesh(expert=8, tensor=2), 4096, 32, ParallelConfig(remat="full", gather="layer"),
        DispatchConfig("capacity", expert_axes=("expert",)),
    ),
    "replicas": Plan(
        MODEL, mesh(expert=8, replica=2), 1024, 64, ParallelConfig(remat="collectives", gather="layer")
    ),
}  # fmt: skip


def main(layout):
    plan = LAYOUTS[layout]
    devices = compile_only_devices("h100_2x8")
    program = Program.from_config(plan.train_config(), build_mesh(plan.mesh, devices))
    step = make_train_step(program, accumulate=plan.accumulate)
    found = compiled_counts(step.lower(plan.batch_size, plan.seq_len).compile(), plan)
    print(json.dumps({"pairs": against_trace(plan, found), "compiled": dataclasses.asdict(found)}))


if __name__ == "__main__":
    main(sys.argv[1])
