"""The configuration of a training run: a model, one layout or several, and everything else but the work directory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax

from moejax.checks import check, check_not_negative, check_positive, check_types
from moejax.config import BalanceConfig, CheckpointConfig, DataConfig, ModelConfig, OptimizerConfig
from moejax.layout import Layout, check_layouts
from moejax.mesh import build_mesh
from moejax.program import Program


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything a training run needs besides its work directory.

    A run of one length has one layout, and a run of mixed lengths one for each: every batch is of one of them, and
    where their meshes differ the state moves between them. All take the same devices. On the command line,
    `--config.layout.remat=full` changes a field of the only layout and `--mesh.expert=8` a field of its mesh; several
    layouts come from a plan, which holds as a whole.

    `compiler_options` are given to XLA after those of `moejax.compiler`, which explains them. They are items
    "name=value", of which the later wins; "name=default" takes one away.

    Raises:
      ConfigError: fields that cannot go together.
    """

    model: ModelConfig = ModelConfig()
    layouts: tuple[Layout, ...] = (Layout(),)
    balance: BalanceConfig = BalanceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    steps: int = 300  # optimizer steps of the whole run
    eval_every: int = 100  # steps between evaluations on held-out text
    eval_batches: int = 8  # batches per evaluation
    sample_tokens: int = 128  # generated at the end of a run; 0 for none
    memory_limit_bytes: int = 0  # of a device, which a step is made to fit in; 0: what the device's runtime says
    compiler_options: tuple[str, ...] = ()  # of XLA, name=value, separated by commas
    seed: int = 0  # of the parameters
    init: str = ""  # a Hugging Face checkpoint's folder, whose weights the run begins with; "" for random ones
    upcycle: str = ""  # makes a dense `init` a mixture of experts: num_experts=8, and other fields of `Upcycling`

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "steps", "eval_every", "eval_batches")
        self.balance.check_moves_a_bias(self.model)
        check_not_negative(self, "sample_tokens", "memory_limit_bytes")
        for item in self.compiler_options:
            check(
                re.match(r"\w+=", item) is not None,
                f"compiler_options item {item!r} must be name=value, such as xla_gpu_dot_merger_threshold_mb=0",
            )
        check_layouts(self.layouts)
        longest, limit = self.layout.seq_len, self.model.max_seq_len
        check(longest <= limit, f"layout.seq_len={longest} must be at most model.max_seq_len={limit}")
        self.optimizer.warmup(self.steps)

    @property
    def layout(self) -> Layout:
        """The only layout; of several the longest, in whose rows held-out text is evaluated."""
        return self.layouts[-1]

    def with_layout(self, **fields: Any) -> TrainConfig:
        """Returns the configuration of one length with other fields of its layout, see `Layout.replace`.

        Raises:
          ConfigError: it has several layouts, or a value is wrong.
        """
        check(len(self.layouts) == 1, f"with_layout changes the only layout, and there are {len(self.layouts)}")
        return dataclasses.replace(self, layouts=(self.layout.replace(**fields),))

    def make_program(self, layout: Layout | None = None, devices: Sequence[jax.Device] | None = None) -> Program:
        """Returns the program of `layout`, by default `self.layout`, on `devices`, by default all that JAX finds.

        Raises:
          ConfigError: the model or a batch does not fit the layout, or the devices are not those of its mesh.
        """
        layout = layout or self.layout
        mesh = build_mesh(layout.mesh, devices)
        return Program(self.model, layout, mesh, self.balance, self.compiler_options)

    def check_fits(self) -> None:
        """Raises `ConfigError` where the model or a batch cannot be divided as a layout says."""
        for layout in self.layouts:
            layout.check(self.model)
