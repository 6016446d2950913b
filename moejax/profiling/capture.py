"""Writes XLA profiler traces of chosen steps, with what is needed to read them; see `capture`.

Beside XLA's own files, under `plugins/`, lie the compiled programs' texts, which say of what phase each operation is,
and `capture.json`.

A training run is traced by `StepCapture`: at steps known before, or at once when a file `profile` appears in its work
directory (`echo 5 > WORKDIR/profile` for five steps, `touch` for three); it is taken away as the trace starts.

Cost (experiments/benchmarks/capture.py, the model `tiny` with 16 × 64 tokens, 16 virtual devices on two quiet cores,
median of six rounds): the three traced steps take 6% longer, the five before them 1%, the five after 4%; CPU time 8, 0
and 2%. To write the trace, 26 MiB, takes 3 s after the last, which `step_seconds` does not count.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax import hlo, strict_json
from moejax.checks import check, make_folder
from moejax.mesh import PIPELINE
from moejax.profiling.phases import ops
from moejax.profiling.trace import FACTS, STEP, trace_files
from moejax.profiling.viewer import show_phases
from moejax.program import Program
from moejax.train.memory_guard import FittedStep

_log = logging.getLogger(__name__)
TRIGGER = "profile"
TRACES = "profiles"  # the folder of a run's traces in its work directory
TRIGGERED_STEPS = 3


class Recording:
    """A trace that is being written; `capture` makes it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._steps: list[dict[str, Any]] = []
        self._programs: list[Any] = []

    @contextlib.contextmanager
    def step(self, number: int, compiled: Any, program: Program | None = None) -> Iterator[None]:
        """Marks a step, which must end inside: wait for its results there.

        Args:
          number: of the step.
          compiled: the program that it runs, as `.lower(...).compile()` returns it.
          program: whose train step it is, for its tokens and for the planner's prediction beside the trace.

        Raises:
          ConfigError: `compiled` is not such a program.
        """
        check(
            isinstance(compiled, jax.stages.Compiled),
            f"compiled={compiled!r:.80} must be a compiled program, as .lower(...).compile() returns it",
        )
        if not any(compiled is program for program in self._programs):
            self._programs.append(compiled)
        index = next(i for i, program in enumerate(self._programs) if program is compiled)
        facts: dict[str, Any] = {"stages": _stages(compiled)}
        if program is not None:
            facts |= {"model": dataclasses.asdict(program.model), "layout": dataclasses.asdict(program.layout)}
        self._steps.append({"step": number, "program": f"program_{index}.txt"} | facts)
        with jax.profiler.StepTraceAnnotation(STEP, step_num=number):
            yield

    def save(self) -> None:
        """Writes the programs' texts and `capture.json`, and phases into the trace of a CPU."""
        texts = [compiled.as_text() for compiled in self._programs]
        for index, text in enumerate(texts):
            (self.directory / f"program_{index}.txt").write_text(text)
        versions = {"jax": jax.__version__}
        facts = {"steps": self._steps, "devices": jax.device_count(), "versions": versions}
        (self.directory / FACTS).write_text(strict_json.dumps(facts, indent=1) + "\n")
        if jax.default_backend() == "cpu":
            programs = [ops(hlo.parse(text)) for text in texts]
            for file in trace_files(self.directory):
                show_phases(file, programs)


def _stages(compiled: Any) -> dict[int, int]:
    """Place along the pipeline of each of this host's devices, by its number there, as the trace names them."""
    shardings = jax.tree.leaves(compiled.input_shardings)
    mesh = next((s.mesh for s in shardings if isinstance(s, NamedSharding) and PIPELINE in s.mesh.axis_names), None)
    if mesh is None:
        return {}
    along = mesh.axis_names.index(PIPELINE)
    return {
        device.local_hardware_id: at[along]
        for at, device in np.ndenumerate(mesh.devices)
        if device.process_index == jax.process_index()
    }


@contextlib.contextmanager
def capture(directory: str | Path) -> Iterator[Recording]:
    """Traces what runs inside, into `directory`; one trace at a time in a process.

        compiled = train_step.lower().compile()
        with capture("traces/a") as recording:
            for i in range(3):
                with recording.step(i, compiled):
                    state, metrics = jax.block_until_ready(compiled(state, batch))

    `experiments/read_trace.py traces/a` reads it, and `tensorboard --logdir=traces` (extra `profile`) shows it.
    Python's own calls are left out: they are most of a trace's events and slow the host down.

    Raises:
      ConfigError: `directory` cannot be made, for a file is there.
    """
    recording = Recording(make_folder("directory", directory))
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(recording.directory), profiler_options=options)
    try:
        yield recording
    finally:
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            recording.save()


def parse_steps(text: str, last: int) -> range:
    """`10:13` as steps 10, 11 and 12, of a run whose steps are 1 to `last`.

    Raises:
      ConfigError: it is no such range, or not of the run's steps.
    """
    found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text)
    steps = range(*map(int, found.groups())) if found else range(0)
    check(
        len(steps) > 0 and steps[0] > 0 and steps[-1] <= last,
        f"--profile_steps={text:.80} must be FIRST:END with 1 <= FIRST < END <= {last + 1}; 10:13 is steps 10, 11 "
        "and 12",
    )
    return steps


class StepCapture:
    """Traces steps of a training run, each trace in a folder of `WORKDIR/profiles`; use it as a context manager.

    Of a run on several hosts, only the first takes requests by file: that trace has its devices alone.

    Args:
        workdir: of the run.
        steps: those to trace; more can be asked for while it runs.
    """

    def __init__(self, workdir: str | Path, steps: range = range(0)) -> None:
        self._workdir, self._wanted = Path(workdir), steps
        self._open = contextlib.ExitStack()
        self._recording: Recording | None = None
        self._end = 0
        self._seen = False

    def __enter__(self) -> StepCapture:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._wanted and not self._seen:
            _log.warning(
                "--profile_steps=%d:%d: the run had no such step to do.", self._wanted.start, self._wanted.stop
            )

    @contextlib.contextmanager
    def step(self, number: int, fitted: FittedStep) -> Iterator[None]:
        """Goes around each step of the run, for `Trainer(around_step=...)`; some 15 µs where none is traced."""
        if self._recording is None:
            self._start(number)
        if self._recording is None:
            yield
            return
        with self._recording.step(number, fitted.compiled, fitted.step.program):
            yield
        if number >= self._end:
            self._close()

    def _start(self, number: int) -> None:
        if number in self._wanted:
            self._end, self._seen = self._wanted[-1], True
        elif count := self._requested():
            self._end = number + count - 1
        else:
            return
        directory = self._workdir / TRACES / f"step_{number:06d}"
        self._recording = self._open.enter_context(capture(directory))

    def _requested(self) -> int:
        """How many steps the trigger file asks for, 0 if it is not there; it is removed."""
        trigger = self._workdir / TRIGGER
        if jax.process_index() > 0 or not trigger.is_file():
            return 0
        text = trigger.read_text(errors="replace").strip()
        trigger.unlink()
        if text and not (text.isdecimal() and len(text) <= 18 and int(text) > 0):
            _log.warning("%s=%.20r must be a number of steps, or empty for %d.", trigger, text, TRIGGERED_STEPS)
            return 0
        return int(text or TRIGGERED_STEPS)

    def _close(self) -> None:
        if self._recording is not None:
            directory, self._recording = self._recording.directory, None
            self._open.close()
            _log.info("traced %s; experiments/read_trace.py %s reads it", directory, directory)
