"""One host of 8 H100s, with NVLink between them.

All devices are on the expert axis: NVLink makes an exchange between any two of them cheap, so there is no need for a
pipeline and its bubble.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=8, pipeline=1, tensor=1, hardware="h100")
