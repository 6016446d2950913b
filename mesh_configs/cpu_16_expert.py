"""16 virtual CPU devices, all of them on the expert axis: the widest dispatch.

One expert of 16 a device, and neither a pipeline's bubble nor a tensor axis, so that what is left is the exchange.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=16, pipeline=1, tensor=1, hardware="cpu")
