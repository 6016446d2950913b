"""A very small model on documents of mixed lengths, with --plan=cpu_16_mixed: about five minutes on two cores.

Its text is the standard library's modules of at most 7,000 bytes. Nearly all of the library's text is in modules longer
than 10,000, and batches are drawn in proportion to text, so short ones would hardly be seen in so short a run.
"""

import dataclasses
import sysconfig
from pathlib import Path

from moejax.config import AttentionConfig, BalanceConfig, CheckpointConfig, DataConfig, OptimizerConfig
from moejax.presets import tiny
from moejax.train.config import TrainConfig


def get_config() -> TrainConfig:
    attention = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=16)
    model = dataclasses.replace(tiny(), num_layers=2, d_model=64, d_ff=128, attention=attention)
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [*library.glob("*.py"), *library.glob("[a-su-z]*/**/*.py")]  # not test/ and tkinter/
    paths = (str(path) for path in sorted(modules) if "-packages" not in str(path) and 0 < path.stat().st_size <= 7000)
    return TrainConfig(
        model=model,
        balance=dataclasses.replace(BalanceConfig.suited_to(model), window=16),
        data=DataConfig(paths=tuple(paths), block_steps=4),
        optimizer=OptimizerConfig(learning_rate=4e-3),
        checkpoint=CheckpointConfig(every=20),
        steps=60,
        eval_every=4,
        eval_batches=2,
        sample_tokens=64,
    )
