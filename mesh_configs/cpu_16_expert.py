"""16 virtual CPU devices, all of them on the expert axis: the fastest of the virtual layouts, and the widest dispatch.

One expert of 16 a device and no pipeline bubble, which virtual devices that share a few cores pay for in full.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=16, pipeline=1, tensor=1, hardware="cpu")
