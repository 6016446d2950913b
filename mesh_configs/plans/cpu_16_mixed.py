"""16 virtual CPU devices for documents of mixed lengths, with --config=mixed: a plan crossing 2,048 and 4,096.

Activations are kept up to 2,048 tokens and computed again above. From 4,096 tokens on, the tensor axis has two
devices, which the expert axis gives up.
"""

from moejax.layout import Layout
from moejax.mesh import MeshConfig


def get_layouts() -> tuple[Layout, ...]:
    short, long = MeshConfig(expert=8, pipeline=2), MeshConfig(expert=4, pipeline=2, tensor=2)
    shapes = ((1024, 8, short), (2560, 8, short), (5120, 4, long))
    return tuple(Layout(mesh, seq_len, batch_size, num_microbatches=1) for seq_len, batch_size, mesh in shapes)


def get_model() -> str:
    return "mixed"
