"""The `small` model: a longer run on a large CPU or one accelerator."""

import dataclasses

from moejax.config import DataConfig, TrainConfig
from moejax.presets import small


def get_config() -> TrainConfig:
    return dataclasses.replace(
        TrainConfig(),
        model=small(),
        data=DataConfig(seq_len=256, batch_size=64),
        steps=2000,
    )
