"""Counts and compiles a step for 16 H100s that are not there: `compiled_ahead_of_time.py CASE`, one of `CASES`.

A process of its own, for the compiler reads its environment when it is loaded. Prints one line of JSON.
"""

import dataclasses
import json
import sys

from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.presets import moe_16x10b
from moejax.profiling.compiled import against_program, compiled_counts
from moejax.program import Program
from moejax.topology import compile_only_devices
from moejax.train.step import make_train_step


def mesh(**sizes):
    return MeshConfig(**sizes, hardware="h100")


WHOLE = moe_16x10b()
HALF = dataclasses.replace(WHOLE, num_layers=8)
CASES = {
    "pipeline": (WHOLE, Layout(mesh(expert=8, pipeline=2), 1024, 64, remat="full", gather="layer")),
    "kept": (HALF, Layout(mesh(expert=8, pipeline=2), 1024, 64, remat="none", gather="step")),
    "all axes": (
        HALF,
        Layout(mesh(expert=4, pipeline=2, tensor=2, hosts=2), 1024, 64, pipeline_repeats=2, remat="minimal").replace(
            hierarchical=True, chunks=2
        ),
    ),
    "split experts": (
        HALF,
        Layout(mesh(expert=8, tensor=2), 4096, 32, remat="full", gather="layer").replace(
            strategy="capacity", expert_axes=("expert",)
        ),
    ),
    "replicas": (HALF, Layout(mesh(expert=8, replica=2), 1024, 64, remat="collectives", gather="layer")),
}


def main(case):
    model, layout = CASES[case]
    program = Program(model, layout, build_mesh(layout.mesh, compile_only_devices("h100_2x8")))
    found = compiled_counts(make_train_step(program).lower().compile(), model, layout)
    print(json.dumps({"pairs": against_program(model, layout, found), "compiled": dataclasses.asdict(found)}))


if __name__ == "__main__":
    main(sys.argv[1])
