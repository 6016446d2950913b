"""The `small` model on a CPU: about a quarter of an hour on two cores."""

from moejax.config import BalanceConfig, DataConfig, OptimizerConfig, TrainConfig
from moejax.presets import small


def get_config() -> TrainConfig:
    return TrainConfig(
        model=small(),
        balance=BalanceConfig.suited_to(small()),
        data=DataConfig(seq_len=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=2e-3),
        steps=500,
    )
