"""16 TPU v5p chips, a 2x2x4 slice: four hosts of 4 chips, all on the same fast interconnect.

The expert axis crosses the hosts, because a slice's links are as fast between hosts as inside one, so that nothing is
worth a pipeline's bubble; tensor=2 stays inside a host.
"""

from moejax.mesh import MeshConfig


def get_config() -> MeshConfig:
    return MeshConfig(expert=8, pipeline=1, tensor=2, hardware="tpu_v5p", hosts=4, host_axis="expert")
