"""One device: a first look at a new model, a debugger; on one accelerator add --mesh.hardware=h100 or what it is.

Every axis is 1, so every collective is gone and the program is the plain model.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=1, pipeline=1, tensor=1, hardware="cpu")
