"""The `tiny` model on bytes, without a tokenizer: about eight minutes on two cores."""

import dataclasses

from moejax.config import BalanceConfig, OptimizerConfig
from moejax.layout import Layout
from moejax.presets import tiny
from moejax.train.config import TrainConfig


def get_config() -> TrainConfig:
    return TrainConfig(
        model=tiny(),
        # On virtual devices more rounds cost less than larger buffers: with sizes up to 4, steps after the first 32
        # took 17% longer, and 88 MiB of a device for 54.
        balance=dataclasses.replace(BalanceConfig.suited_to(tiny()), capacity_factors=(1.25, 1.5, 2.0)),
        layouts=(Layout(seq_len=256, batch_size=16),),
        optimizer=OptimizerConfig(learning_rate=3e-3),
        steps=300,
    )
