"""A run's scalars: one JSON line per step in `metrics.jsonl`, and the same for TensorBoard; its loads in `loads.jsonl`.

The files are for programs and for `tail -f`: each line is whole JSON and on disk (in the kernel) when `write` returns.
A run that was killed and resumed from the checkpoint of step n repeats the steps after n, so their old lines are
dropped when the writer is made. A file has at most one line per step, and exactly one unless the disk was full.

The loads are lines of integers too, for what survives a kill is then the same for both. Text costs little here: 16
layers of 16 experts with 40,000 assignments each are 1.5 KB a step, against 1 KB as 32-bit numbers.

Dimensions: L mixture-of-experts layers, E experts, N steps.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, SupportsFloat

import numpy as np
from absl import logging

from moejax import strict_json
from moejax.checks import ConfigError, check
from moejax.train.files import AppendOnlyFile
from moejax.train.load_image import load_image
from moejax.train.tensorboard import EventFile

METRICS_FILE = "metrics.jsonl"
LOADS_FILE = "loads.jsonl"
TENSORBOARD_DIR = "tensorboard"


class MetricsWriter:
    """Writes the scalars of each step to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`, loads to `loads.jsonl`.

        with MetricsWriter("runs/a") as writer:
            writer.write(1, {"loss": 2.5})
        assert read_metrics("runs/a") == [{"step": 1, "loss": 2.5}]

    NaN and the infinities are the strings "NaN", "Infinity" and "-Infinity" (see `moejax.strict_json`), which
    `read_metrics` turns back into the number.

    A full disk does not end a run: what cannot be written is left out, whole lines at a time. A warning says so at
    the 1st, 10th, 100th ... failure, when writing works again, and at the end.

    In a run of several processes, process 0 alone should make one.

    Args:
      workdir: the run's directory; made if it is not there.
      resume_step: the step that the run starts from, 0 for a new one. What an earlier run wrote for later steps is
        dropped (from each file at once and atomically; TensorBoard hides it).

    Raises:
      ConfigError: a line of a file that is there is damaged.
      OSError: a file cannot be opened. Nothing has been trained yet, so this is the time to say so.
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        if resume_step < 0:
            raise ValueError(f"resume_step={resume_step} must be 0 (a new run) or the step resumed from")
        self._directory = pathlib.Path(workdir)
        self._directory.mkdir(parents=True, exist_ok=True)
        self.path = self._directory / METRICS_FILE
        self._last_step = resume_step
        paths = self.path, self._directory / LOADS_FILE
        for path in paths:
            _drop_after(path, resume_step)
        self._file, self._loads = map(AppendOnlyFile, paths)
        self._tensorboard = EventFile(self._directory / TENSORBOARD_DIR, first_step=resume_step + 1)
        self._failures = 0  # writes of which a part could not be written
        self._said = 0  # of these, those that a line has counted
        self._failing = False  # whether a warning of it is the last that was said

    def write(self, step: int, metrics: Mapping[str, SupportsFloat | str], load_LE: np.ndarray | None = None) -> None:
        """Appends one line for `step`, which must come after every step written so far.

        Args:
          step: the optimizer step, counted from 1.
          metrics: scalars by name (Python, NumPy or JAX; whoever passes a `jax.Array` waits for it here), or words,
            which TensorBoard does not get.
          load_LE: the assignments that each expert got in the step, whole numbers of any dtype, for `loads.jsonl`.

        Raises:
          ValueError: if the step is not a new one, or a name or value cannot be written.
        """
        if step <= self._last_step:
            raise ValueError(
                f"step={step} must be more than {self._last_step}, the last step in {self.path}: one line per step"
            )
        if "step" in metrics:
            raise ValueError("metrics has the name 'step', which is the line's own; rename it")
        scalars = {name: _to_float(name, value) for name, value in metrics.items()}
        self._last_step = step
        numbers = {name: value for name, value in scalars.items() if isinstance(value, float)}
        records = [
            (self._file, _line({"step": step} | scalars)),
            (self._tensorboard.file, self._tensorboard.scalars(step, numbers)),
        ]
        if load_LE is not None:
            loads = {"step": step, "load_LE": np.asarray(load_LE, np.int64).tolist()}
            records.append((self._loads, _line(loads, separators=(",", ":"))))
        self._append(step, records)

    def write_by_layer(self, step: int, figures: Mapping[str, np.ndarray], load_LE: np.ndarray) -> None:
        """Gives TensorBoard scalars of each layer, `name/layer_00` and so on, and a picture of the loads.

        Args:
          step: the optimizer step.
          figures: arrays [L] by name.
          load_LE: assignments to each expert; see `moejax.train.load_image` for what the picture shows.
        """
        numbers = {
            f"{name}/layer_{layer:02}": float(value)
            for name, figure_L in figures.items()
            for layer, value in enumerate(figure_L)
        }
        picture = self._tensorboard.picture(step, "window_load/layer_by_expert", load_image(load_LE))
        file = self._tensorboard.file
        self._append(step, [(file, self._tensorboard.scalars(step, numbers)), (file, picture)])

    def _append(self, step: int, records: Sequence[tuple[AppendOnlyFile, bytes]]) -> None:
        """Appends each record that can be written; says which can't, but not every time."""
        errors = []
        for file, record in records:
            try:
                file.append(record)
            except OSError as error:
                errors.append(error)
        if errors:
            self._failures += 1
            if str(self._failures).strip("0") == "1":  # 1, 10, 100 ...
                first = errors[0]
                logging.warning(
                    "Step %d: metrics are not written whole: %s: %s. Training goes on without them.",
                    step, first.strerror, first.filename,
                )  # fmt: skip
                self._failing = True
        elif self._failing:
            self._failing = False
            logging.warning("Step %d: metrics are written again; %s.", step, self._count_missing())

    def _count_missing(self) -> str:
        self._said = self._failures
        return f"{self._failures} writes to {self._directory} are missing so far"

    def close(self) -> None:
        """Closes all files; harmless when called again."""
        if self._failures > self._said:
            logging.warning("Some metrics could not be written; %s.", self._count_missing())
        for file in (self._file, self._loads, self._tensorboard.file):
            file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what a `MetricsWriter` wrote: a dict a line, `step` an int and everything else a float or a word.

    `path` is the file or the run's directory. A last line that a kill tore is left out, with a warning.

    Raises:
      ConfigError: naming the file and line, if any other line is not a JSON object.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / METRICS_FILE
    return [
        {name: value if name == "step" else _decode(value) for name, value in record.items()}
        for _, record in _records(path)
    ]


def read_loads(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """Reads the loads that a `MetricsWriter` wrote: steps [N] and assignments to each expert [N, L, E], both int64.

    `path` is the file or the run's directory. A last line that a kill tore is left out, with a warning.

    Raises:
      FileNotFoundError: the run has recorded none.
      ConfigError: naming the file and line, if any other line is not a JSON object, or has no loads of the first
        line's shape.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / LOADS_FILE
    steps: list[int] = []
    loads: list[np.ndarray] = []
    for number, (_, record) in enumerate(_records(path), start=1):
        try:
            load_LE = np.asarray(record["load_LE"], np.int64)
        except (LookupError, ValueError, TypeError, OverflowError):  # none, ragged, or no whole numbers
            load_LE = np.empty(0, np.int64)
        check(
            load_LE.ndim == 2 and (not loads or load_LE.shape == loads[0].shape),
            f"{path}, line {number} has no load_LE of layers × experts, as many as line 1 has; delete that line, or "
            "move the file away",
        )
        steps.append(record["step"])
        loads.append(load_LE)
    return np.asarray(steps, np.int64), np.asarray(loads, np.int64)


def _to_float(name: str, value: SupportsFloat | str) -> float | str:
    if isinstance(value, str):
        if value in strict_json.NOT_FINITE:
            raise ValueError(f"metrics[{name!r}]={value!r} reads as a number; pass the float")
        return value
    try:
        return float(value)
    except TypeError as error:
        raise ValueError(f"metrics[{name!r}]={value!r} must be a scalar") from error


def _line(record: dict[str, Any], **options: Any) -> bytes:
    return strict_json.dumps(record, **options).encode() + b"\n"


def _decode(value: float | str) -> float | str:
    return value if isinstance(value, str) and value not in strict_json.NOT_FINITE else float(value)


def _records(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields where each whole line of the file ends, in bytes, and what it holds."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            # The newline is written last, so a line without one is torn even where it happens to parse.
            if not line.endswith(b"\n"):
                logging.warning("%s, line %d is torn and left out: %.80r", path, number, line)
                return
            end += len(line)
            try:
                record = json.loads(line)
                ok = isinstance(record, dict) and isinstance(record.get("step"), int)
            except ValueError:
                ok = False
            if not ok:
                raise ConfigError(
                    f"{path}, line {number} is not a JSON object with an integer 'step': {line[:80]!r}; "
                    "delete that line, or move the file away"
                )
            yield end, record


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Cuts off a torn last line and the lines of steps after `step`; needs no space on the disk."""
    if path.exists():
        os.truncate(path, max((end for end, record in _records(path) if record["step"] <= step), default=0))
