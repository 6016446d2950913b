"""Tells what a train step will take memory for, before it runs: by phase, by what it is, and buffer by buffer.

    python experiments/memory.py --out=memory.png                                                 # virtual CPU devices
    python experiments/memory.py --config=moe_16x10b --target=h100_2x8 --config.layout.remat=full
    python experiments/memory.py --config=moe_16x10b --target=tpu_v5p_16 --top=40 --markdown=m.md --json=m.json

The step is compiled and not run: for the devices of --mesh, or with --target for accelerators that are not there
(extra `aot`), on the mesh of the target's name unless --mesh says another; of a plan's lengths, for the one that is
predicted to take the most. All figures are of one device at the step's peak, as the compiler has laid it out, beside
the planner's prediction; see moejax.profiling.memory for what is counted as what. With --out, a picture of memory over
the step's schedule (extra `plots`). In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

import time

from absl import flags

from experiments.shared import common, loading
from moejax import strict_json
from moejax.planner.hardware import get_device
from moejax.planner.memory import predict_memory
from moejax.plots import SUFFIXES
from moejax.profiling import memory_report
from moejax.profiling.buffers import compile_with_buffers
from moejax.profiling.memory import StepMemory
from moejax.topology import compile_only_devices
from moejax.train.step import make_train_step

FLAGS = common.ConfigFlags(__doc__)
_TARGET = flags.DEFINE_string(
    "target", None, "What to compile for instead of this machine, see moejax.topology.", flag_values=FLAGS
)
_TOP = flags.DEFINE_integer("top", 20, "How many of the largest buffers to list.", lower_bound=1, flag_values=FLAGS)
_OUT = FLAGS.define_output("out", "Where a picture goes: .png, .svg or .pdf.", *SUFFIXES)
_MARKDOWN = FLAGS.define_output("markdown", "Where to write the tables.")
_JSON = FLAGS.define_output("json", "Where to write the figures as JSON.")


def main(argv: list[str]) -> None:
    config = FLAGS.parse_config(argv)
    target, devices = _TARGET.value, None
    if target:
        config = FLAGS.for_target(target, config)
        devices = compile_only_devices(target)
    else:
        FLAGS.setup_jax(config.layout.mesh)
    layout = max(config.layouts, key=lambda layout: predict_memory(config.model, layout).peak_bytes)
    device, predicted = get_device(layout.mesh.hardware), predict_memory(config.model, layout)
    program = config.make_program(layout, devices)
    lowered = make_train_step(program, config.optimizer, steps=config.steps).lower()
    began = time.perf_counter()
    memory = StepMemory.of(*compile_with_buffers(lowered))
    compile_s = time.perf_counter() - began

    what = f"{FLAGS.config}, {layout.batch_size:,} × {layout.seq_len:,} tokens"
    title = f"Memory of a train step of {what}, a device of {target or FLAGS.plan or FLAGS.mesh}"
    text = f"{title}\n\n{memory_report.as_markdown(memory, predicted, device, _TOP.value)}"
    data = memory_report.as_data(memory, predicted, device, _TOP.value) | {"compile_s": round(compile_s, 1)}
    print(text)
    if _MARKDOWN.value:
        _MARKDOWN.value.write_text(text + "\n")
    if _JSON.value:
        _JSON.value.write_text(strict_json.dumps(data, indent=1) + "\n")
    if _OUT.value:
        memory_report.figure(memory, device, title).savefig(_OUT.value, dpi=120)
        print(f"\nwritten: {_OUT.value}")
    loading.print_json(data)


if __name__ == "__main__":
    loading.run(main, FLAGS)
