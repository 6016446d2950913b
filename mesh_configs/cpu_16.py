"""16 virtual CPU devices on every axis at once: the default of tests and of a first run.

All three axes are larger than 1, so that every collective of the real layouts runs on a machine without accelerators.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=4, pipeline=2, tensor=2, hardware="cpu")
