"""A plan: everything that decides what each device does. What the planner predicts, searches over and writes down."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from moejax.config import BalanceConfig, DataConfig, DispatchConfig, ModelConfig, ParallelConfig, TrainConfig
from moejax.mesh import MeshConfig

Mode = Literal["train", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A model on a mesh with a batch: `batch_size` sequences over all devices, each of `seq_len` tokens.

    With `mode` "prefill" the step is the forward pass alone, "decode" one token for each sequence after `seq_len` of
    them.
    """

    model: ModelConfig
    mesh: MeshConfig
    seq_len: int
    batch_size: int
    parallel: ParallelConfig = ParallelConfig()
    dispatch: DispatchConfig = DispatchConfig()
    accumulate: int = 1
    mode: Mode = "train"

    @property
    def tokens(self) -> int:
        """Tokens of one step, over all devices."""
        return self.batch_size * (1 if self.mode == "decode" else self.seq_len)

    @property
    def balance(self) -> BalanceConfig:
        """The balancing that a run of the plan gets unless it says otherwise."""
        return BalanceConfig.suited_to(self.model)

    def train_config(self, **fields: Any) -> TrainConfig:
        """The training run that follows the plan; `fields` are those of `TrainConfig` that it does not decide."""
        data = DataConfig(seq_len=self.seq_len, batch_size=self.batch_size)
        chosen: dict[str, Any] = {"data": data, "balance": self.balance} | fields
        return TrainConfig(
            model=self.model, parallel=self.parallel, dispatch=self.dispatch, accumulate=self.accumulate, **chosen
        )
