"""Compiles the train step for accelerators that are not there and tells how much of its communication is overlapped.

    python experiments/overlap.py --target=h100_2x8,tpu_v5p_16 --seq_len=1024 --batch_size=64 --chunks=1,2,4
    python experiments/overlap.py --config.compiler_options=xla_gpu_dot_merger_threshold_mb=default

One row for each target, batch split and number of chunks, of the reference model on the mesh of the target's name; see
`moejax.profiling.overlap` for what the figures mean. Needs the extra `aot`. In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from typing import Any

from absl import flags

from experiments.shared import common, loading
from moejax import hlo
from moejax.checks import make_folder
from moejax.profiling import overlap
from moejax.topology import compile_only_devices
from moejax.train.config import TrainConfig
from moejax.train.step import make_train_step

FLAGS = common.ConfigFlags(__doc__, config="moe_16x10b")
_TARGET = flags.DEFINE_list(
    "target", ["h100_2x8", "tpu_v5p_16"], "What to compile for, see moejax.topology.", flag_values=FLAGS
)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 1024, "Tokens per sequence.", lower_bound=1, flag_values=FLAGS)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 64, "Sequences per step.", lower_bound=1, flag_values=FLAGS)
_CHUNKS = FLAGS.define_numbers("chunks", [1, 2, 4], "Values of layout.dispatch.chunks.")
_BATCH_SPLIT = FLAGS.define_numbers("batch_split", [1, 2], "Values of layout.batch_split.", lower=0)
_OUT = FLAGS.define_output("out", "A Markdown file for the table.")
_TEXT = FLAGS.define_output("text", "A folder for the compiled programs' texts.", folder=True)

# Dense bfloat16 FLOP/s and bytes/s that a device sends to its neighbors, both of them peaks of the data sheets.
_PEAKS = {
    "a100_64gb": (312e12, 300e9),
    "h100": (989e12, 450e9),
    "tpu_v5p": (459e12, 600e9),
    "tpu_v5e": (197e12, 200e9),
}

_COLUMNS = (
    "target", "batch split", "chunks", "all-to-all, GB", "asynchronous", "with matrix work", "hidden",
    "everything, GB", "hidden", "TFLOP", "peak, GB", "compile, s",
)  # fmt: skip
HEADER = f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}"


def main(argv: list[str]) -> None:
    config = FLAGS.parse_config(argv)
    print(HEADER)
    rows = []
    choices = itertools.product(_TARGET.value, _BATCH_SPLIT.value, _CHUNKS.value)
    for target, batch_split, chunks in choices:
        variant = FLAGS.for_target(target, config).with_layout(
            batch_split=batch_split, chunks=chunks, seq_len=_SEQ_LEN.value, batch_size=_BATCH_SIZE.value
        )
        rows.append({"target": target, "batch_split": batch_split, "chunks": chunks} | measure(target, variant))
        print(line(rows[-1]), flush=True)
    if _OUT.value:
        _OUT.value.write_text("\n".join([HEADER, *map(line, rows)]) + "\n")
    loading.print_json(rows)


def measure(target: str, config: TrainConfig) -> dict[str, Any]:
    """Figures of one compiled step."""
    layout = config.layout
    lowered = make_train_step(config.make_program(devices=compile_only_devices(target)), config.optimizer).lower()
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_s = time.perf_counter() - began
    text = compiled.as_text()
    if _TEXT.value:
        name = f"{target}_{layout.batch_split}_{layout.dispatch.chunks}.txt"
        (make_folder("--text", _TEXT.value) / name).write_text(text)
    flops_per_s, bytes_per_s = _PEAKS[layout.mesh.hardware]
    module = hlo.parse(text, overlap.attention_flops(layout.seq_len))
    found = overlap.measure(module, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s)
    waited_s = sum(o.waited_s for o in found.values())
    return {
        "tflop": module.computation_flops(module.entry) / 1e12,
        "peak_gb": compiled.memory_analysis().peak_memory_in_bytes / 1e9,
        "compile_s": compile_s,
        "hidden": max(0.0, 1 - waited_s / (sum(o.sent_bytes for o in found.values()) / bytes_per_s)),
        "collectives": {kind: dataclasses.asdict(o) for kind, o in found.items()},
    }


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    exchange = row["collectives"]["all-to-all"]
    total = sum(o["sent_bytes"] for o in row["collectives"].values())
    cells = [row["target"], row["batch_split"], row["chunks"], f"{exchange['sent_bytes'] / 1e9:.2f}"]
    cells += [f"{exchange[name]:.0%}" for name in ("asynchronous", "overlapped", "hidden")]
    cells += [f"{total / 1e9:.2f}", f"{row['hidden']:.0%}", f"{row['tflop']:.1f}"]
    cells += [f"{row['peak_gb']:.1f}", f"{row['compile_s']:.0f}"]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    loading.run(main, FLAGS)
