"""The reference model's train step compiles for 16 devices without a weight being made, at every sequence length.

XLA:CPU holds bfloat16 stacks of saved activations as float32, so its temporaries are not an accelerator's.
"""

import math

import jax
import pytest

from moejax import Layout, MeshConfig, Program, make_train_step
from moejax.presets import moe_16x10b

LENGTHS = [  # sequence length, batch size: fewer sequences as they grow
    (128, 128),
    (1024, 128),
    (4096, 64),
    (10_240, 32),
]


def make_step(*axes, seq_len=128, batch_size=128):
    return make_train_step(Program(moe_16x10b(), Layout(MeshConfig(*axes), seq_len, batch_size, num_microbatches=4)))


def stored_bytes(shapes):
    """Bytes of one device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


def share_bytes(step):
    """Bytes of a weight and its two moments, over the devices."""
    return 3 * 4 * sum(math.prod(x.shape) for x in jax.tree.leaves(step.state_shapes.params)) / step.program.mesh.size


def test_no_device_has_more_than_its_share():
    step = make_step(4, 2, 2)
    assert stored_bytes(step.state_shapes) == pytest.approx(share_bytes(step), rel=2e-3)  # norms, routers are copied


@pytest.mark.slow
@pytest.mark.parametrize(("expert", "pipeline", "tensor"), [(4, 2, 2), (8, 2, 1)])
@pytest.mark.parametrize(("seq_len", "batch_size"), LENGTHS)
def test_the_reference_model_compiles_on_16_devices(seq_len, batch_size, expert, pipeline, tensor):
    step = make_step(expert, pipeline, tensor, seq_len=seq_len, batch_size=batch_size)
    memory = step.lower().compile().memory_analysis()

    stored = stored_bytes((step.state_shapes, step.program.batch_shapes))
    assert memory.argument_size_in_bytes == pytest.approx(stored, rel=1e-4)
    # No device has more than its part: only norms and routers are stored twice.
    assert memory.argument_size_in_bytes == pytest.approx(share_bytes(step), rel=2e-3)
    # The new state takes the old one's place.
    assert memory.output_size_in_bytes == pytest.approx(memory.argument_size_in_bytes, rel=2e-3)
    assert memory.alias_size_in_bytes == pytest.approx(memory.output_size_in_bytes, rel=1e-3)
    assert memory.temp_size_in_bytes > 0
