"""A run's scalars: one JSON line a step in `metrics.jsonl`, and the same for TensorBoard.

The file is for programs and for `tail -f`: each line is whole JSON and on disk (in the kernel) when `write` returns. A
run that was killed and resumed from the checkpoint of step n repeats the steps after n, so their old lines are dropped
when the writer is made, and the file has exactly one line a step.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, SupportsFloat

import tensorboardX
from absl import logging

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_DIR = "tensorboard"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class MetricsWriter:
    """Writes the scalars of each step to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`.

    JSON has no number for NaN and the infinities, and a strict reader rejects Python's bare `NaN`. They are written as
    the strings "NaN", "Infinity" and "-Infinity", which `read_metrics`, `float()` in Python and `Number()` in
    JavaScript all turn back into the number; null would not tell them apart.

    In a run of several processes, process 0 alone should make one.

    Args:
      workdir: the run's directory; made if it is not there.
      resume_step: the step that the run starts from, 0 for a new one. What an earlier run wrote for later steps is
        dropped (from the file at once and atomically; TensorBoard is told to hide it).
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        if resume_step < 0:
            raise ValueError(f"resume_step={resume_step} must be 0 (a new run) or the step resumed from")
        directory = pathlib.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS_FILE
        self._last_step = resume_step
        _drop_after(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._tensorboard = tensorboardX.SummaryWriter(
            str(directory / TENSORBOARD_DIR),
            purge_step=resume_step + 1,
            # The file is named after the second it is made in: two runs within one would overwrite each other.
            filename_suffix=f".{time.time_ns()}",
        )

    def write(self, step: int, metrics: Mapping[str, SupportsFloat | str]) -> None:
        """Appends one line for `step`, which must come after every step written so far.

        Args:
          step: the optimizer step, counted from 1.
          metrics: scalars by name (Python, NumPy or JAX; whoever passes a `jax.Array` waits for it here), or words,
            which TensorBoard does not get.

        Raises:
          ValueError: if the step is not a new one, or a name or value cannot be written.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step={step} must be more than {self._last_step}, the last step in {self.path}: one line a step"
            )
        if "step" in metrics:
            raise ValueError("metrics has the name 'step', which is the line's own; rename it")
        scalars = {name: _to_float(name, value) for name, value in metrics.items()}
        line = json.dumps({"step": step} | {name: _encode(value) for name, value in scalars.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        self._last_step = step
        for name, value in scalars.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(name, value, step)

    def close(self) -> None:
        """Flushes and closes both; harmless when called again."""
        self._file.close()
        self._tensorboard.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what a `MetricsWriter` wrote: a dict a line, `step` an int and everything else a float or a word.

    `path` is the file or the run's directory. A last line that a kill tore is left out, with a warning.

    Raises:
      ValueError: naming the file and line, if any other line is not a JSON object.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    return [
        {name: value if name == "step" else _decode(value) for name, value in record.items()}
        for _, record in _records(path)
    ]


def _to_float(name: str, value: SupportsFloat | str) -> float | str:
    if isinstance(value, str):
        if value in _NOT_FINITE:
            raise ValueError(f"metrics[{name!r}]={value!r} reads as a number; pass the float")
        return value
    try:
        return float(value)
    except TypeError as error:
        raise ValueError(f"metrics[{name!r}]={value!r} must be a scalar") from error


def _encode(value: float | str) -> float | str:
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: float | str) -> float | str:
    return value if isinstance(value, str) and value not in _NOT_FINITE else float(value)


def _records(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields each whole line of the file with what it holds."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            # The newline is written last, so a line without one is torn even where it happens to parse.
            if not line.endswith("\n"):
                logging.warning("%s, line %d is torn and left out: %.80r", path, number, line)
                return
            try:
                record = json.loads(line)
                ok = isinstance(record, dict) and isinstance(record.get("step"), int)
            except json.JSONDecodeError:
                ok = False
            if not ok:
                raise ValueError(
                    f"{path}, line {number} is not a JSON object with an integer 'step': {line[:80]!r}; "
                    "delete that line, or move the file away"
                )
            yield line, record


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Rewrites the file without a torn last line and the lines of steps after `step`: all at once or not at all."""
    if not path.exists():
        return
    kept = path.with_suffix(".tmp")
    with kept.open("w", encoding="utf-8") as file:
        file.writelines(line for line, record in _records(path) if record["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    kept.replace(path)
