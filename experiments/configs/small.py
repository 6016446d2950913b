"""The `small` model on a CPU: about a quarter of an hour on two cores."""

from moejax.config import BalanceConfig, OptimizerConfig
from moejax.layout import Layout
from moejax.presets import small
from moejax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=small(),
        balance=BalanceConfig.suited_to(small()),
        layouts=(Layout(seq_len=256, batch_size=16),),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        steps=500,
    )
