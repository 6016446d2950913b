"""The `tiny` model on a CPU: a first run, about five minutes on two cores."""

from moejax.config import BalanceConfig, DataConfig, OptimizerConfig, TrainConfig
from moejax.presets import tiny


def get_config() -> TrainConfig:
    return TrainConfig(
        model=tiny(),
        # Bytes of text are skewed (a quarter are spaces), and a short run has no time for a weak pull.
        # Tried for 150 steps: 0.01, 0.05, 0.2 end at a load CV of 0.6, 0.23, 0.15; 0.2 costs 0.2 bits per byte.
        balance=BalanceConfig(aux_loss_weight=0.05),
        data=DataConfig(seq_len=256, batch_size=16),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30),
        steps=300,
    )
