"""Times the train step of a configuration: tokens/s, and seconds from the start of the process to the first step's end.

    python experiments/benchmarks/train.py --config=peer --mesh=cpu_16
    python experiments/benchmarks/train.py --config=tiny --steps=20 --compilation_cache_dir=

Tokens are random: routing is then nearly uniform, text is more skewed. The start is a cold one only with
`--compilation_cache_dir=`. In a pipe, ends with one line of JSON.

Tried on the `peer` shape (two cores, CPU seconds a step): saving elementwise results for the backward pass 2.3, not
saving them 1.7, skipping the pipeline's bubble 1.45, keeping the allocator's pages 0.93. Full rematerialization is no
slower than none (0.86): what it computes again costs what it spares in stacking. 4 microbatches for 2: the same.
"""

from __future__ import annotations

import time

START = time.perf_counter()

import statistics  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402
from absl import flags  # noqa: E402

from experiments.shared import common, loading  # noqa: E402
from moejax.train.memory_guard import MemoryUse  # noqa: E402
from moejax.train.step import make_train_step  # noqa: E402

FLAGS = common.ConfigFlags(__doc__)
_STEPS = flags.DEFINE_integer("steps", 20, "Steps that are timed.", lower_bound=1, flag_values=FLAGS)
_WARMUP = flags.DEFINE_integer("warmup", 3, "Steps before them that are not.", lower_bound=1, flag_values=FLAGS)


def main(argv: list[str]) -> None:
    config = FLAGS.parse_config(argv)
    layout = config.layout
    FLAGS.setup_jax(layout.mesh)
    times = {"import": time.perf_counter() - START}
    train_step = make_train_step(config.make_program(), config.optimizer, steps=config.steps)

    lowered = train_step.lower()
    times["trace"] = time.perf_counter() - START
    compiled = lowered.compile()
    times["compile"] = time.perf_counter() - START
    state = jax.block_until_ready(train_step.init(jax.random.key(config.seed)))
    times["init"] = time.perf_counter() - START
    batch = train_step.put_batch(random_batch(layout.batch_size, layout.seq_len, config.model.vocab_size))

    seconds = []
    for i in range(_WARMUP.value + _STEPS.value):
        began = time.perf_counter()
        state, metrics = compiled(state, batch)
        loss = float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
        if i == 0:
            times["first step"] = time.perf_counter() - START
    for name, second in times.items():
        print(f"{second:7.2f} s  {name} done")
    timed = seconds[_WARMUP.value :]
    print(f"step: median {statistics.median(timed):.3f} s, from {min(timed):.3f} to {max(timed):.3f}; loss {loss:.3f}")
    tokens = layout.tokens
    figures = {
        "tokens_per_second": tokens / statistics.median(timed),
        "step_seconds_median": statistics.median(timed),
        "step_seconds_min": min(timed),
        "step_seconds_max": max(timed),
        "first_step_seconds": times["first step"],
        "tokens_per_step": tokens,
        "steps": len(timed),
        "device_memory_bytes": MemoryUse.of(compiled).total,
        "mesh": layout.mesh.shape,
        "hardware": layout.mesh.hardware,
        "jax": jax.__version__,
    }
    loading.print_json(figures)


def random_batch(batch_size: int, seq_len: int, vocab_size: int) -> dict[str, np.ndarray]:
    """Random tokens in one segment a row."""
    tokens = np.random.default_rng(0).integers(0, vocab_size, (batch_size, seq_len + 1), dtype=np.int32)
    return {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones_like(tokens[:, 1:])}


if __name__ == "__main__":
    loading.run(main, FLAGS)
