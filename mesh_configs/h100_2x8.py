"""Two hosts of 8 H100s: NVLink inside a host, InfiniBand across.

The pipeline crosses the hosts, because one stage hands the next only its activations, the fewest bytes of all axes,
while every dispatch and every gather of parameters stays on NVLink.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=8, pipeline=2, tensor=1, hardware="h100", hosts=2, host_axis="pipeline")
