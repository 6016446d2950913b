"""moejax: train and plan sparse Mixture-of-Experts transformers in JAX."""

import importlib
from typing import TYPE_CHECKING, Any

from moejax.balance import BalanceReport, BalanceState, ExpertLoadBalancer
from moejax.checks import ConfigError
from moejax.config import (
    AttentionConfig,
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    DispatchConfig,
    LatentConfig,
    ModelConfig,
    OptimizerConfig,
    RopeConfig,
    RopeScalingConfig,
    RouterConfig,
)
from moejax.data import load_data
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh, local_mesh_config
from moejax.modules import MoELayer, MoEStats, Transformer
from moejax.presets import get_preset
from moejax.program import Program
from moejax.runtime import setup_jax, use_virtual_devices
from moejax.topology import compile_only_devices
from moejax.train.config import TrainConfig
from moejax.train.step import TrainState, TrainStep, make_train_step

if TYPE_CHECKING:
    from moejax.interop import load_hf, read_model_config, save_hf
    from moejax.train.checkpoint import Checkpointer, CheckpointError
    from moejax.train.loop import Trainer
    from moejax.train.metrics import MetricsWriter, read_metrics

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "BalanceConfig",
    "BalanceReport",
    "BalanceState",
    "CheckpointConfig",
    "CheckpointError",
    "Checkpointer",
    "ConfigError",
    "DataConfig",
    "DispatchConfig",
    "ExpertLoadBalancer",
    "LatentConfig",
    "Layout",
    "MeshConfig",
    "MetricsWriter",
    "MoELayer",
    "MoEStats",
    "ModelConfig",
    "OptimizerConfig",
    "Program",
    "RopeConfig",
    "RopeScalingConfig",
    "RouterConfig",
    "TrainConfig",
    "TrainState",
    "TrainStep",
    "Trainer",
    "Transformer",
    "__version__",
    "build_mesh",
    "compile_only_devices",
    "get_preset",
    "load_data",
    "load_hf",
    "local_mesh_config",
    "make_train_step",
    "read_metrics",
    "read_model_config",
    "save_hf",
    "setup_jax",
    "use_virtual_devices",
]

if not TYPE_CHECKING:  # a type checker must not take any name for one that is here
    # Imported when first asked for, because they take a tenth of a second.
    _MODULES = {
        "CheckpointError": "moejax.train.checkpoint",
        "Checkpointer": "moejax.train.checkpoint",
        "MetricsWriter": "moejax.train.metrics",
        "Trainer": "moejax.train.loop",
        "load_hf": "moejax.interop",
        "read_metrics": "moejax.train.metrics",
        "read_model_config": "moejax.interop",
        "save_hf": "moejax.interop",
    }

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module 'moejax' has no attribute {name!r}")
        return getattr(importlib.import_module(_MODULES[name]), name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})
