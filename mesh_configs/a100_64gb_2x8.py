"""Two hosts of 8 A100s of 64 GB, the reference cluster: NVLink inside a host, InfiniBand across.

The pipeline crosses the hosts, because one stage hands the next only its activations, the fewest bytes of all axes,
while every dispatch and every gather of parameters stays on NVLink.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=8, pipeline=2, tensor=1, hardware="a100_64gb", hosts=2, host_axis="pipeline")
