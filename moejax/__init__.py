"""moejax: train and plan sparse Mixture-of-Experts transformers in JAX."""

from moejax.balance import BalanceReport, BalanceState, ExpertLoadBalancer
from moejax.config import (
    BalanceConfig,
    CheckpointConfig,
    ConfigError,
    DataConfig,
    DispatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from moejax.data import load_data, make_loader
from moejax.mesh import MeshConfig, build_mesh, local_mesh_config
from moejax.model import Program
from moejax.modules import MoELayer, MoEStats, Transformer
from moejax.presets import get_preset
from moejax.runtime import setup_jax, use_virtual_devices
from moejax.topology import compile_only_devices
from moejax.train.step import TrainState, TrainStep, make_train_step

__version__ = "0.1.0"

__all__ = [
    "BalanceConfig",
    "BalanceReport",
    "BalanceState",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "DispatchConfig",
    "ExpertLoadBalancer",
    "MeshConfig",
    "MoELayer",
    "MoEStats",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Program",
    "TrainConfig",
    "TrainState",
    "TrainStep",
    "Transformer",
    "__version__",
    "build_mesh",
    "compile_only_devices",
    "get_preset",
    "load_data",
    "local_mesh_config",
    "make_loader",
    "make_train_step",
    "setup_jax",
    "use_virtual_devices",
]
