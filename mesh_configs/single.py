"""The CPU as one device: the fastest way to train on a machine without accelerators, and for a debugger.

Every axis is 1, so there are no collectives and the program is the plain model. For accelerators use --mesh=local.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=1, pipeline=1, tensor=1, hardware="cpu")
