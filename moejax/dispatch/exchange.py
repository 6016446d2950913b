"""The exchange: buffers to the devices that hold their experts, and back.

Dimensions: E experts, e this device's experts, n = E / e devices, C rows a sender reserves for an expert, D model.
"""

import jax

from moejax.nn.collectives import all_to_all


def to_experts(buffer_ECD: jax.Array, expert_axes: tuple[str, ...]) -> jax.Array:
    """[E, C, D] of this device's tokens -> [e, n * C, D] of every device's tokens for this device's experts."""
    return all_to_all(buffer_ECD, expert_axes, 0, 1)


def to_senders(buffer_eCD: jax.Array, expert_axes: tuple[str, ...]) -> jax.Array:
    """The way back: [e, n * C, D] -> [E, C, D]."""
    return all_to_all(buffer_eCD, expert_axes, 1, 0)
