"""A small model for the table of load balance: 20 runs of it take half an hour on two cores."""

import dataclasses

from moejax.config import AttentionConfig, BalanceConfig, CheckpointConfig, OptimizerConfig
from moejax.layout import Layout
from moejax.presets import tiny
from moejax.train.config import TrainConfig


def get_config() -> TrainConfig:
    attention = AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16)
    model = dataclasses.replace(tiny(), num_layers=2, d_model=64, d_ff=128, attention=attention)
    return TrainConfig(
        model=model,
        balance=BalanceConfig.suited_to(model),
        layouts=(Layout(seq_len=256, batch_size=8, num_microbatches=1),),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=30),  # as the recorded table was trained
        checkpoint=CheckpointConfig(every=1000, keep=1),
        steps=150,
        eval_every=150,
    )
