"""What a trace costs the steps around it: those before, traced and after, against steps of a block without a trace.

    python experiments/benchmarks/capture.py --config.layout.seq_len=64 --config.layout.batch_size=16

Blocks of steps with a trace in their middle and blocks without take turns; both go through the hook that a training run
has around each step. Wall clock, and the process's CPU time, which other work on the machine hardly changes. To write
the trace is outside of all steps and told apart. In a pipe, ends with one line of JSON.
"""

from __future__ import annotations

import statistics
import tempfile
import time
import types
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
from absl import flags

from experiments.benchmarks.train import random_batch
from experiments.shared import common, loading
from moejax.planner.report import table
from moejax.profiling.capture import StepCapture
from moejax.train.step import TrainStep, make_train_step

KINDS = ("without", "before", "traced", "after")
FLAGS = common.ConfigFlags(__doc__)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Blocks of each kind.", lower_bound=1, flag_values=FLAGS)
_TRACED = flags.DEFINE_integer("traced", 3, "Steps that are traced in a block.", lower_bound=1, flag_values=FLAGS)
_AROUND = flags.DEFINE_integer("around", 5, "Steps before them, and as many after.", lower_bound=1, flag_values=FLAGS)


def main(argv: list[str]) -> None:
    config = FLAGS.parse_config(argv)
    FLAGS.setup_jax(config.layout.mesh)
    step = make_train_step(config.make_program(), config.optimizer, steps=config.steps)
    tokens = random_batch(config.layout.batch_size, config.layout.seq_len, config.model.vocab_size)
    bench = Bench(step, tokens, seed=config.seed)
    bench.block(with_trace=False)  # warms up
    bench.forget()
    for _ in range(_ROUNDS.value):
        bench.block(with_trace=False)
        bench.block(with_trace=True)
    bench.show()


class Bench:
    """Runs blocks of steps and keeps the seconds of each by kind: before, traced and after, or without a trace."""

    def __init__(self, step: TrainStep, tokens: dict[str, np.ndarray], *, seed: int) -> None:
        self._fitted = types.SimpleNamespace(compiled=step.lower().compile(), step=step)
        self._state, self._batch = step.init(jax.random.key(seed)), step.put_batch(tokens)
        self.forget()

    def forget(self) -> None:
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.cpu: dict[str, list[float]] = defaultdict(list)
        self.writing: list[float] = []
        self.sizes: list[int] = []

    def block(self, *, with_trace: bool) -> None:
        """`--around` steps, `--traced` ones and `--around` again."""
        around, traced = _AROUND.value, _TRACED.value
        kinds = [*["before"] * around, *["traced"] * traced, *["after"] * around]
        wanted = range(around, around + traced) if with_trace else range(0)
        with tempfile.TemporaryDirectory() as folder, StepCapture(folder, wanted) as profiler:
            for number, kind in enumerate(kinds):
                began = time.perf_counter()
                with profiler.step(number, self._fitted):
                    wall, cpu = self._step()
                self.wall[kind if with_trace else "without"].append(wall)
                self.cpu[kind if with_trace else "without"].append(cpu)
                if number == wanted.stop - 1:
                    self.writing.append(time.perf_counter() - began - wall)
            if with_trace:
                self.sizes.append(sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()))

    def _step(self) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        self._state, _ = jax.block_until_ready(self._fitted.compiled(self._state, self._batch))
        return time.perf_counter() - wall, time.process_time() - cpu

    def show(self) -> None:
        """The medians, in a table and as JSON."""
        wall_ms = {kind: 1e3 * statistics.median(self.wall[kind]) for kind in KINDS}
        cpu_ms = {kind: 1e3 * statistics.median(self.cpu[kind]) for kind in KINDS}
        rows = [
            (kind, len(self.wall[kind]), *(f"{x:.2f}" for x in (
                wall_ms[kind], wall_ms[kind] / wall_ms["without"], cpu_ms[kind], cpu_ms[kind] / cpu_ms["without"],
            )))
            for kind in KINDS
        ]  # fmt: skip
        writing_s, trace_bytes = statistics.median(self.writing), statistics.median(self.sizes)
        print(table(("steps", "number", "wall, ms", "over those without", "CPU, ms", "over those without"), rows))
        print(f"\nWritten after the last traced one: {trace_bytes / 2**20:.1f} MiB in {writing_s:.2f} s.")
        figures = {f"{kind}_step_ms": ms for kind, ms in wall_ms.items()}
        figures |= {f"{kind}_step_cpu_ms": ms for kind, ms in cpu_ms.items()}
        loading.print_json(figures | {"trace_bytes": trace_bytes, "writing_seconds": writing_s})


if __name__ == "__main__":
    loading.run(main, FLAGS)
