"""RMSNorm (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.nn.weights import compute_copy


def rms_norm(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last dim [..., D]; statistics in float32, result in x's dtype."""
    x32_D = x_D.astype(jnp.float32)
    y_D = x32_D * lax.rsqrt(jnp.mean(jnp.square(x32_D), axis=-1, keepdims=True) + eps)
    scale_D = compute_copy(scale_D, x_D, jnp.float32).reshape((1,) * (y_D.ndim - 1) + scale_D.shape)
    return (y_D * scale_D).astype(x_D.dtype)
