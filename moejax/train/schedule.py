"""A run's train steps, one per layout, and the moves of its state between their meshes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import grain
import jax
from jax.sharding import Mesh

from moejax.data import BucketShape, Data, make_bucketed_loader
from moejax.train.config import TrainConfig
from moejax.train.reshard import lie_alike, reshard
from moejax.train.step import TrainState, TrainStep, make_train_step


class Schedule:
    """The layouts of a run, each with its train step; and the moves of the state between their meshes.

    `reshards` and `reshard_seconds` count the moves and what they took.

    Args:
        config: of the run.
        devices: that every layout takes. Default: all that JAX finds.

    Raises:
        ConfigError: the model or a batch does not fit a layout, or the devices are not those of its mesh.
    """

    def __init__(self, config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> None:
        self.config, self.layouts = config, config.layouts
        config.check_fits()
        self.train_steps: tuple[TrainStep, ...] = tuple(
            make_train_step(config.make_program(layout, devices), config.optimizer, steps=config.steps)
            for layout in config.layouts
        )
        states = [step.state_shapes for step in self.train_steps]
        self._groups = [next(i for i, first in enumerate(states) if lie_alike(state, first)) for state in states]
        self._at = len(states) - 1
        self.reshards, self.reshard_seconds = 0, 0.0

    @property
    def mesh(self) -> Mesh:
        """The mesh of the longest layout."""
        mesh = self.train_steps[-1].program.mesh
        assert isinstance(mesh, Mesh), "a run needs devices"
        return mesh

    @property
    def shapes(self) -> list[BucketShape]:
        """The shapes of the batches to draw: layouts whose states are placed alike are of one group."""
        pairs = zip(self.layouts, self._groups, strict=True)
        return [BucketShape(layout.seq_len, layout.batch_size, group) for layout, group in pairs]

    @property
    def at(self) -> TrainStep:
        """The step whose mesh the state is on; that of the longest layout at the start."""
        return self.train_steps[self._at]

    def make_loader(self, data: Data, report: Callable[[str], None] | None = None) -> grain.DatasetIterator:
        """Returns the batches to train on; with several layouts, each batch says which one it is for.

        `report` is called with a line every few seconds while the text is encoded.
        """
        if len(self.layouts) == 1:
            layout = self.config.layout
            return data.batches(seq_len=layout.seq_len, batch_size=layout.batch_size, report=report)
        return make_bucketed_loader(data.config, self.shapes, data.train_documents, data.tokenizer, report=report)

    def move(self, state: TrainState, index: int) -> tuple[TrainState, float]:
        """The state as the step of layout `index` takes it, and the seconds that took: 0 where it lies so already.

        What is moved is deleted where it was.
        """
        seconds = 0.0
        if self._groups[index] != self._groups[self._at]:
            began = time.perf_counter()
            state = reshard(state, self.train_steps[index].state_shapes, donate=True)
            seconds = time.perf_counter() - began
            self.reshards += 1
            self.reshard_seconds += seconds
        self._at = index
        return state, seconds

    def params_for(self, params: Any, index: int) -> Any:
        """The state's parameters as the step of layout `index` takes them: copies, where they lie otherwise."""
        alike = self._groups[index] == self._groups[self._at]
        return params if alike else reshard(params, self.train_steps[index].state_shapes.params)
