"""What a plan decides for training, bucket by bucket; and a run's train steps, one per bucket.

A plan is a Python file that `experiments/train.py --mesh=` takes. Besides `get_config`, which any mesh file has, it has
`get_buckets() -> tuple[Bucket, ...]`: one for a run of one length, several for mixed lengths. Each has its own batch,
mesh, rematerialization and dispatch, and so a step of its own; where their meshes differ the state moves between them.
`get_model() -> str` names the model that the plan was made for, as `--config` takes it.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grain
from jax.sharding import Mesh

from moejax.config import DispatchConfig, ParallelConfig, TrainConfig, check, check_types
from moejax.data import BucketShape, Data, make_bucketed_loader, make_loader
from moejax.mesh import MeshConfig, build_mesh
from moejax.model import Program
from moejax.overrides import call_in_file
from moejax.train.reshard import lie_alike, reshard
from moejax.train.step import TrainState, TrainStep, make_train_step

LINE_LENGTH = 120  # of the plan files that are written
DECIDES = ("data.seq_len", "data.batch_size", "parallel", "dispatch", "accumulate")  # fields of TrainConfig


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Batches of `batch_size` sequences of `seq_len` tokens, over all devices, and how a step of them is spread."""

    seq_len: int
    batch_size: int
    mesh: MeshConfig = MeshConfig()
    parallel: ParallelConfig = ParallelConfig()
    dispatch: DispatchConfig = DispatchConfig()
    accumulate: int = 1

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("seq_len", "batch_size", "accumulate"):
            value = getattr(self, name)
            check(value > 0, f"{name}={value} must be positive")

    def applied(self, config: TrainConfig) -> TrainConfig:
        """`config` with what the bucket decides (`DECIDES`)."""
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, seq_len=self.seq_len, batch_size=self.batch_size),
            parallel=self.parallel,
            dispatch=self.dispatch,
            accumulate=self.accumulate,
        )


def check_buckets(buckets: Sequence[Bucket]) -> None:
    """Raises `ConfigError` unless lengths ascend and every bucket takes the same devices."""
    lengths = [bucket.seq_len for bucket in buckets]
    check(lengths == sorted(set(lengths)), f"buckets have seq_len={lengths}, which must ascend")
    for name in ("num_devices", "hardware", "hosts"):
        values = [getattr(bucket.mesh, name) for bucket in buckets]
        check(len(set(values)) == 1, f"buckets have mesh.{name}={values}, which must be the same for all")


def load_buckets(path: str | Path) -> tuple[Bucket, ...]:
    """The buckets of a mesh file: those of its `get_buckets()`, none if it has no such function.

    Raises:
      ConfigError: the file fails, or the buckets are none or cannot go together.
    """
    buckets = call_in_file(path, "get_buckets", "tuple[Bucket, ...]")
    if buckets is None:
        return ()
    whole = isinstance(buckets, tuple) and buckets and all(isinstance(bucket, Bucket) for bucket in buckets)
    check(bool(whole), f"{path}: get_buckets() returned {buckets!r:.80}; it must return a tuple of Buckets")
    check_buckets(buckets)
    return buckets


def load_plan_model(path: str | Path) -> str | None:
    """Returns the model that the plan in a mesh file was made for, its `get_model()`; None if it does not say.

    Raises:
      ConfigError: the file fails, or returns something else than a name.
    """
    model = call_in_file(path, "get_model", "str")
    check(model is None or isinstance(model, str), f"{path}: get_model() returned {model!r:.80}; it must return a name")
    return model


def write_plan_file(path: str | Path, buckets: Sequence[Bucket], model: str, title: str) -> None:
    """Writes a plan as a mesh file, which `load_buckets` and `load_plan_model` read.

    The same arguments give the same text. Every field is written out, so that a later default does not change an old
    plan.

    Args:
        path: of the file, which is replaced.
        buckets: in ascending order of `seq_len`, on the same devices.
        model: what the plan was made for, as `--config` takes it: a name, or the path of a Python file.
        title: the file's docstring, of one or more lines.

    Raises:
      ConfigError: the buckets are none or cannot go together, or the title is no docstring.
    """
    check(len(buckets) > 0, "buckets=() must hold one at least")
    check_buckets(buckets)
    lines = title.splitlines() or [""]
    fits = bool(lines[0]) and all(len(line) <= LINE_LENGTH - 6 and line == line.rstrip() for line in lines)
    check(fits and not set(title) & {'"', "\\"}, f"title={title!r} must be lines of at most 114 characters, no quotes")
    last_line = "\n" if len(lines) > 1 else ""
    items = "".join(f"        {_source(bucket, 8)},\n" for bucket in buckets)
    Path(path).write_text(
        f'"""{title}{last_line}"""\n\n'
        "from moejax.config import DispatchConfig, ParallelConfig\n"
        "from moejax.mesh import MeshConfig\n"
        "from moejax.train.schedule import Bucket\n\n\n"
        f"def get_buckets() -> tuple[Bucket, ...]:\n    return (\n{items}    )\n\n\n"
        f"def get_model() -> str:\n    return {_source(model, 0)}\n\n\n"
        "def get_config() -> MeshConfig:\n    return get_buckets()[0].mesh\n",
        encoding="utf-8",
    )


def _source(value: Any, indent: int, before: int = 0) -> str:
    """Python that makes `value`, as ruff formats it `indent` columns in, after `before` characters of its line."""
    if not dataclasses.is_dataclass(value):
        if isinstance(value, tuple):
            items = ", ".join(_source(item, indent) for item in value)
            return f"({items},)" if len(value) == 1 else f"({items})"
        return _quoted(value) if isinstance(value, str) else repr(value)
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    name = type(value).__name__
    line = f"{name}({', '.join(f'{key}={_source(item, 0)}' for key, item in fields.items())})"
    if not isinstance(value, Bucket) and indent + before + len(line) + 1 <= LINE_LENGTH:
        return line
    inner = indent + 4
    lines = "".join(f"{' ' * inner}{key}={_source(item, inner, len(key) + 1)},\n" for key, item in fields.items())
    return f"{name}(\n{lines}{' ' * indent})"


def _quoted(text: str) -> str:
    """Returns `text` in double quotes, with what UTF-8 cannot encode spelled out: the bytes of some files' names."""
    return json.dumps(text, ensure_ascii=False).encode(errors="backslashreplace").decode()


class Schedule:
    """The buckets of a run, each with its train step; and the moves of the state between their meshes.

    A run of one length has one bucket. `reshards` and `reshard_seconds` count the moves and what they took.

    Args:
        configs: the run's configuration as each bucket has it.
        meshes: of each bucket, over the same devices.

    Raises:
        ConfigError: a bucket does not fit on its mesh.
    """

    def __init__(self, configs: Sequence[TrainConfig], meshes: Sequence[Mesh]) -> None:
        self.configs = tuple(configs)
        self.train_steps: tuple[TrainStep, ...] = tuple(
            make_train_step(
                Program.from_config(config, mesh), config.optimizer, steps=config.steps, accumulate=config.accumulate
            )
            for config, mesh in zip(configs, meshes, strict=True)
        )
        layouts = [step.state_shapes for step in self.train_steps]
        self._groups = [next(i for i, first in enumerate(layouts) if lie_alike(layout, first)) for layout in layouts]
        self._at = len(layouts) - 1
        self.reshards, self.reshard_seconds = 0, 0.0

    @classmethod
    def of_buckets(cls, config: TrainConfig, buckets: Sequence[Bucket], mesh: Mesh) -> Schedule:
        """The schedule of a plan's buckets on the devices of `mesh`; without buckets, that of `config` on `mesh`."""
        if not buckets:
            return cls([config], [mesh])
        check_buckets(buckets)
        devices = list(mesh.devices.flat)
        return cls(
            [bucket.applied(config) for bucket in buckets], [build_mesh(bucket.mesh, devices) for bucket in buckets]
        )

    @property
    def shapes(self) -> list[BucketShape]:
        """What is drawn: buckets whose states lie alike are of one group."""
        data = [config.data for config in self.configs]
        return [BucketShape(d.seq_len, d.batch_size, group) for d, group in zip(data, self._groups, strict=True)]

    @property
    def at(self) -> TrainStep:
        """The step whose layout the state has; the last bucket's at the start."""
        return self.train_steps[self._at]

    def make_loader(self, data: Data, report: Callable[[str], None] | None = None) -> grain.DatasetIterator:
        """Returns the batches to train on; with several buckets, each batch says which one it is for.

        `report` is called with a line every few seconds while the text is encoded.
        """
        config = self.configs[0].data
        if len(self.configs) == 1:
            return make_loader(config, data.train_documents, data.tokenizer, report=report)
        return make_bucketed_loader(config, self.shapes, data.train_documents, data.tokenizer, report=report)

    def move(self, state: TrainState, bucket: int) -> tuple[TrainState, float]:
        """The state as the bucket's step takes it, and the seconds that took: 0 where it lies so already.

        What is moved is deleted where it was.
        """
        seconds = 0.0
        if self._groups[bucket] != self._groups[self._at]:
            began = time.perf_counter()
            state = reshard(state, self.train_steps[bucket].state_shapes, donate=True)
            seconds = time.perf_counter() - began
            self.reshards += 1
            self.reshard_seconds += seconds
        self._at = bucket
        return state, seconds

    def params_for(self, params: Any, bucket: int) -> Any:
        """The state's parameters as the bucket's step takes them: copies, where they lie otherwise."""
        alike = self._groups[bucket] == self._groups[self._at]
        return params if alike else reshard(params, self.train_steps[bucket].state_shapes.params)
