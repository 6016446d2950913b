"""Tells what a train step will take memory for, before it runs: by phase, by what it is, and buffer by buffer.

    python experiments/memory.py --out=memory.png                                                 # virtual CPU devices
    python experiments/memory.py --config=moe_16x10b --target=h100_2x8 --config.parallel.remat=full
    python experiments/memory.py --config=moe_16x10b --target=tpu_v5p_16 --top=40 --markdown=m.md --json=m.json

The step is compiled and not run: for the devices of --mesh, or with --target for accelerators that are not there
(extra `aot`), on the mesh of the target's name unless --mesh says another; of a plan's lengths, for the one that is
predicted to take the most. All figures are of one device at the step's peak, as the compiler has laid it out, beside
the planner's prediction; see moejax.profiling.memory for what is counted as what. With --out, a picture of memory over
the step's schedule (extra `plots`). Ends with one line of JSON.
"""

from __future__ import annotations

import time
from pathlib import Path

import audit_cases
import common
import loading
from absl import flags

from moejax import strict_json
from moejax.config import check
from moejax.mesh import build_mesh
from moejax.model import Program
from moejax.planner.hardware import get_device
from moejax.planner.memory import predict_memory
from moejax.plots import check_suffix, pyplot
from moejax.profiling import memory_report
from moejax.profiling.buffers import compile_with_buffers
from moejax.profiling.memory import StepMemory
from moejax.topology import compile_only_devices
from moejax.train.step import make_train_step

_TARGET = flags.DEFINE_string("target", None, "What to compile for instead of this machine, see moejax.topology.")
_TOP = flags.DEFINE_integer("top", 20, "How many of the largest buffers to list.", lower_bound=1)
_OUT = flags.DEFINE_string("out", None, "Where a picture goes: .png, .svg or .pdf.")
_MARKDOWN = flags.DEFINE_string("markdown", None, "Where to write the tables.")
_JSON = flags.DEFINE_string("json", None, "Where to write the figures as JSON.")


def main(argv: list[str]) -> None:
    config, mesh_config, rest = common.parse_configs(argv)
    check(len(rest) == 1, f"{' '.join(rest[1:])} is no flag; flags start with --")
    if buckets := common.plan_buckets():
        cases = [(bucket.applied(config), bucket.mesh) for bucket in buckets]
        config, mesh_config = max(cases, key=lambda case: predict_memory(audit_cases.plan_of(*case)).peak_bytes)
    paths = {name: Path(flag.value).expanduser() for name, flag in _FILES.items() if flag.value}
    for name, path in paths.items():
        check(path.parent.is_dir(), f"--{name}={path} is in a folder that does not exist; make {path.parent} first")
        check(not path.is_dir(), f"--{name}={path} is a folder; give a file")
    if "out" in paths:
        check_suffix("--out", paths["out"])
        pyplot()  # says so now if it is missing
    target, devices = _TARGET.value, None
    if target:
        devices = compile_only_devices(target)
        mesh_config = mesh_config if flags.FLAGS["mesh"].present else loading.load_mesh_config(target)
    else:
        common.setup_jax(mesh_config)
    device, plan = get_device(mesh_config.hardware), audit_cases.plan_of(config, mesh_config)
    program = Program.from_config(config, build_mesh(mesh_config, devices))
    train_step = make_train_step(program, config.optimizer, steps=config.steps, accumulate=config.accumulate)
    lowered = train_step.lower(plan.batch_size, plan.seq_len)
    began = time.perf_counter()
    memory, predicted = StepMemory.of(*compile_with_buffers(lowered)), predict_memory(plan)
    compile_s = time.perf_counter() - began

    what = f"{flags.FLAGS['config'].value}, {plan.batch_size:,} × {plan.seq_len:,} tokens"
    title = f"Memory of a train step of {what}, a device of {target or flags.FLAGS['mesh'].value}"
    text = f"{title}\n\n{memory_report.as_markdown(memory, predicted, device, _TOP.value)}"
    data = memory_report.as_data(memory, predicted, device, _TOP.value) | {"compile_s": round(compile_s, 1)}
    print(text)
    if "markdown" in paths:
        paths["markdown"].write_text(text + "\n")
    if "json" in paths:
        paths["json"].write_text(strict_json.dumps(data, indent=1) + "\n")
    if "out" in paths:
        memory_report.figure(memory, device, title).savefig(paths["out"], dpi=120)
        print(f"\nwritten: {paths['out']}")
    print(strict_json.dumps(data))


_FILES = {"out": _OUT, "markdown": _MARKDOWN, "json": _JSON}

if __name__ == "__main__":
    loading.run(main)
