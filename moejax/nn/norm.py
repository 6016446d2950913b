"""RMSNorm (arXiv 1910.07467)."""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.mesh import TENSOR
from moejax.nn.collectives import pmean
from moejax.nn.weights import compute_copy


def rms_norm(x_D: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """`x / rms(x) * scale` over the last dim [..., D]; statistics in float32, result in x's dtype."""
    x32_D = x_D.astype(jnp.float32)
    return _normalize(x_D, jnp.mean(jnp.square(x32_D), axis=-1, keepdims=True), scale_D, eps)


def rms_norm_heads(x_nH: jax.Array, scale_nH: jax.Array, eps: float) -> jax.Array:
    """`rms_norm` over all heads as one vector; of [..., n, H], this device has n heads, split over `tensor`."""
    x32_nH = x_nH.astype(jnp.float32)
    return _normalize(x_nH, pmean(jnp.mean(jnp.square(x32_nH), axis=(-2, -1), keepdims=True), TENSOR), scale_nH, eps)


def _normalize(x: jax.Array, mean_square: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    y = x.astype(jnp.float32) * lax.rsqrt(mean_square + eps)
    scale = compute_copy(scale, x, jnp.float32).reshape((1,) * (y.ndim - scale.ndim) + scale.shape)
    return (y * scale).astype(x.dtype)
