"""Two layers of the `tiny` model on byte-pair tokens: a first run, about three minutes on two slow cores.

A token stands for 3 bytes on average, so a step sees three times the text that it would as bytes. In so few steps two
layers learn as much as four, in half the time.
"""

import dataclasses

from moejax.config import BalanceConfig, CheckpointConfig, DataConfig, DispatchConfig, OptimizerConfig
from moejax.layout import Layout
from moejax.presets import tiny
from moejax.train.config import TrainConfig


def get_config() -> TrainConfig:
    model = dataclasses.replace(tiny(), num_layers=2, vocab_size=2048)
    return TrainConfig(
        model=model,
        # Virtual devices share a CPU, where experts that compute empty rows of a buffer cost time: a step of four
        # layers takes 1.0 s instead of 1.5 s with "dropless". XLA has no ragged exchange for CPUs, so an all-gather
        # stands in for it. Its buffers keep one size, because every other one would be compiled on these cores beside
        # the first steps.
        layouts=(Layout(seq_len=256, batch_size=16, dispatch=DispatchConfig("ragged", capacity_factor=2.0)),),
        # A short run must balance its experts in fewer steps: with the usual rate the load is still uneven at the end.
        balance=dataclasses.replace(BalanceConfig.suited_to(model), bias_update_rate=0.03, capacity_factors=()),
        data=DataConfig(tokenizer="bpe", tokenizer_vocab_size=2048),
        optimizer=OptimizerConfig(learning_rate=5e-3),
        steps=110,
        eval_every=55,
        checkpoint=CheckpointConfig(every=110),  # at the end only
        sample_tokens=64,
    )
