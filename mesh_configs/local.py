"""All devices of this machine, whatever they are: one or eight GPUs, TPU chips, or the CPU.

All of them are on the expert axis, where each holds a part of the batch and of the experts. JAX is started to find
them, and `hardware` is what they call themselves, or "custom" for a kind that the planner has no figures of.
"""

from moejax.mesh import MeshConfig, local_mesh_config


def get_config() -> MeshConfig:
    return local_mesh_config()
