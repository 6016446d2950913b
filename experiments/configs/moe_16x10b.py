"""The reference model on 16 accelerators, at 1,024 tokens a sequence; the planner picks for other lengths."""

import dataclasses

from moejax.config import DataConfig, ParallelConfig, TrainConfig
from moejax.presets import moe_16x10b


def get_config() -> TrainConfig:
    return dataclasses.replace(
        TrainConfig(),
        model=moe_16x10b(),
        data=DataConfig(tokenizer="bpe", tokenizer_vocab_size=32_000, seq_len=1024, batch_size=64),
        parallel=ParallelConfig(num_microbatches=4),
    )
