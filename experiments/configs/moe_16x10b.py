"""The reference model on 16 accelerators, at 1,024 tokens per sequence; the planner picks for other lengths."""

from moejax.config import BalanceConfig, DataConfig
from moejax.layout import Layout
from moejax.presets import moe_16x10b
from moejax.train.config import TrainConfig


def get_config() -> TrainConfig:
    model = moe_16x10b()
    return TrainConfig(
        model=model,
        balance=BalanceConfig.suited_to(model),
        data=DataConfig(tokenizer="bpe", tokenizer_vocab_size=32_000),
        layouts=(Layout(seq_len=1024, batch_size=64, num_microbatches=4),),
    )
