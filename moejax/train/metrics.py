"""A run's scalars: one JSON line a step in `metrics.jsonl`, and the same for TensorBoard; its loads in `loads.jsonl`.

The files are for programs and for `tail -f`: each line is whole JSON and on disk (in the kernel) when `write` returns.
A run that was killed and resumed from the checkpoint of step n repeats the steps after n, so their old lines are
dropped when the writer is made, and a file has exactly one line a step.

The loads are lines of integers too, for what survives a kill is then the same for both. Text costs little here: 16
layers of 16 experts with 40,000 assignments each are 1.5 KB a step, against 1 KB as 32-bit numbers.

Dimensions: L mixture-of-experts layers, E experts, N steps.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
import time
from collections.abc import Iterator, Mapping
from typing import Any, SupportsFloat

import numpy as np
import tensorboardX
from absl import logging
from tensorboardX.proto.summary_pb2 import Summary

from moejax.config import ConfigError
from moejax.train.load_image import encode_png, load_image

METRICS_FILE = "metrics.jsonl"
LOADS_FILE = "loads.jsonl"
TENSORBOARD_DIR = "tensorboard"
_NOT_FINITE = ("NaN", "Infinity", "-Infinity")


class MetricsWriter:
    """Writes the scalars of each step to `<workdir>/metrics.jsonl` and `<workdir>/tensorboard`, loads to `loads.jsonl`.

    JSON has no number for NaN and the infinities, and a strict reader rejects Python's bare `NaN`. They are written as
    the strings "NaN", "Infinity" and "-Infinity", which `read_metrics`, `float()` in Python and `Number()` in
    JavaScript all turn back into the number; null would not tell them apart.

    In a run of several processes, process 0 alone should make one.

    Args:
      workdir: the run's directory; made if it is not there.
      resume_step: the step that the run starts from, 0 for a new one. What an earlier run wrote for later steps is
        dropped (from each file at once and atomically; TensorBoard is told to hide it).
    """

    def __init__(self, workdir: str | os.PathLike[str], *, resume_step: int = 0) -> None:
        if resume_step < 0:
            raise ValueError(f"resume_step={resume_step} must be 0 (a new run) or the step resumed from")
        directory = pathlib.Path(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / METRICS_FILE
        self._last_step = resume_step
        paths = self.path, directory / LOADS_FILE
        for path in paths:
            _drop_after(path, resume_step)
        self._file, self._loads = (path.open("a", encoding="utf-8") for path in paths)
        self._tensorboard = tensorboardX.SummaryWriter(
            str(directory / TENSORBOARD_DIR),
            purge_step=resume_step + 1,
            # The file is named after the second it is made in: two runs within one would overwrite each other.
            filename_suffix=f".{time.time_ns()}",
        )

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
                f"step={step} must be more than {self._last_step}, the last step in {self.path}: one line a step"
            )
        if "step" in metrics:
            raise ValueError("metrics has the name 'step', which is the line's own; rename it")
        scalars = {name: _to_float(name, value) for name, value in metrics.items()}
        line = json.dumps({"step": step} | {name: _encode(value) for name, value in scalars.items()}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        if load_LE is not None:
            loads = json.dumps({"step": step, "load_LE": np.asarray(load_LE, np.int64).tolist()}, separators=(",", ":"))
            self._loads.write(loads + "\n")
            self._loads.flush()
        self._last_step = step
        for name, value in scalars.items():
            if isinstance(value, float):
                self._tensorboard.add_scalar(name, value, step)

    def write_by_layer(self, step: int, figures: Mapping[str, np.ndarray], load_LE: np.ndarray) -> None:
        """Gives TensorBoard scalars of each layer, `name/layer_00` and so on, and a picture of the loads.

        Args:
          step: the optimizer step.
          figures: arrays [L] by name.
          load_LE: assignments to each expert; see `moejax.train.load_image` for what the picture shows.
        """
        for name, figure_L in figures.items():
            for layer, value in enumerate(figure_L):
                self._tensorboard.add_scalar(f"{name}/layer_{layer:02}", float(value), step)
        image = load_image(load_LE)
        height, width, _ = image.shape
        png = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encode_png(image))
        value = Summary.Value(tag="window_load/layer_by_expert", image=png)
        # `add_image` would encode it as well, but with a library that nothing else here needs.
        self._tensorboard.file_writer.add_summary(Summary(value=[value]), step)

    def close(self) -> None:
        """Flushes and closes all; harmless when called again."""
        self._file.close()
        self._loads.close()
        self._tensorboard.close()

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
      ConfigError: naming the file and line, if any other line is not a JSON object.
      ValueError: the shapes differ.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / LOADS_FILE
    records = [record for _, record in _records(path)]
    load_NLE = np.asarray([record["load_LE"] for record in records], np.int64)
    return np.asarray([record["step"] for record in records], np.int64), load_NLE


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
                raise ConfigError(
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
