"""The shape that MaxText was measured at on the same CPUs: 16 experts, top-2, 64 sequences of 128; for benchmarks."""

import dataclasses

from moejax.config import AttentionConfig, RouterConfig
from moejax.layout import Layout
from moejax.presets import tiny
from moejax.train.config import TrainConfig


def get_config() -> TrainConfig:
    model = dataclasses.replace(
        tiny(),
        router=RouterConfig(score="softmax"),
        d_model=64,
        d_ff=128,
        num_layers=4,
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16),
    )
    return TrainConfig(model=model, layouts=(Layout(seq_len=128, batch_size=64, num_microbatches=2),))
