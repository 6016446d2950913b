"""The `tiny` model on a CPU: a first run, minutes long."""

from moejax.config import TrainConfig
from moejax.presets import tiny


def get_config() -> TrainConfig:
    return TrainConfig(model=tiny())
