"""The `tiny` model on a CPU: a first run, about eight minutes on two cores."""

from moejax.config import BalanceConfig, DataConfig, OptimizerConfig, TrainConfig
from moejax.presets import tiny


def get_config() -> TrainConfig:
    return TrainConfig(
        model=tiny(),
        balance=BalanceConfig.suited_to(tiny()),
        data=DataConfig(seq_len=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30),
        steps=300,
    )
