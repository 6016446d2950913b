"""Rotary position embedding (arXiv 2104.09864), on halves as Llama and Mixtral have it."""

import jax
import jax.numpy as jnp


def rope_table(seq_len: int, rotary_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [1, seq_len, 1, rotary_dim / 2], of positions 0 … seq_len - 1.

    Attention only sees position differences, and packed documents do not see each other, so positions need not
    restart at a document.
    """
    frequency = theta ** (-jnp.arange(0, rotary_dim, 2, dtype=jnp.float32) / rotary_dim)
    angle = jnp.arange(seq_len, dtype=jnp.float32)[:, None] * frequency[None, :]
    return jnp.cos(angle)[None, :, None, :], jnp.sin(angle)[None, :, None, :]


def apply_rope(x_BSNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each pair (i, i + R/2) of a head's R leading dims by its position's angle; computed in float32.

    The table is for R dims. Those after them stay as they are, for any position.
    """
    half = cos.shape[-1]
    a, b, rest = jnp.split(x_BSNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_BSNH.dtype)
