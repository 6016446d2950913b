"""moejax: train, plan and serve sparse Mixture-of-Experts transformers in JAX."""

from moejax.config import ConfigError
from moejax.mesh import MeshConfig, build_mesh, use_virtual_devices

__all__ = ["ConfigError", "MeshConfig", "build_mesh", "use_virtual_devices"]
