"""Causal grouped-query attention on GPUs: the Pallas kernel that comes with jax, lowered through Triton.

Chosen because it is the one library kernel that takes segment ids, has a backward pass, and compiles without the GPU at
hand. `jax.nn.dot_product_attention` (cuDNN) and tokamax take segments only as an S × S mask; cuDNN and tokamax's Mosaic
kernels must also see the device when they are traced or compiled. jax 0.11 announces that it will drop this kernel, and
Pallas' way through Triton with it, so expect to replace this file.

Dims: B batch, S sequence, N query heads, K key-value heads, G = N // K query heads that share one of them, H head_dim.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.kernels import manual
from moejax.kernels.attention import cost

with warnings.catch_warnings():  # the announcement above, which a user of moejax can do nothing about
    warnings.simplefilter("ignore", DeprecationWarning)
    from jax.experimental.pallas.ops.gpu import attention as pallas_attention


def attention(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Causal attention inside segments, see `moejax.kernels.attention.attention`.

    `interpret` evaluates the kernel's body with plain jax operations, on any device: slow, for tests.
    """
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    block = cost.gpu_block(S, H, q_BSNH.dtype.itemsize)
    padded_S, padded_H = cost.padded("gpu", S, H, q_BSNH.dtype.itemsize)
    extra_S, extra_H = padded_S - S, padded_H - H

    def pad(x_BSXH: jax.Array) -> jax.Array:  # at the end, where causality hides the tokens
        return jnp.pad(x_BSXH, ((0, 0), (0, extra_S), (0, 0), (0, extra_H)))

    q_GBSKH = jnp.moveaxis(pad(q_BSNH).reshape(B, S + extra_S, K, N // K, H + extra_H), 3, 0)
    segment_ids_BS = jnp.pad(segment_ids_BS, ((0, 0), (0, extra_S)))
    o_GBSKH = _kernel(H**-0.5, block, interpret)(q_GBSKH, pad(k_BSKH), pad(v_BSKH), segment_ids_BS)
    return jnp.moveaxis(o_GBSKH, 0, 3).reshape(B, S + extra_S, N, H + extra_H)[:, :S, :, :H]


@functools.cache
def _kernel(scale: float, block: int, interpret: bool) -> Callable[..., jax.Array]:
    def kernel(q_GBSKH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        def one_query_per_key(q_BSKH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array) -> jax.Array:
            # By position, for it is a custom_vjp with positions: scale, causal, blocks, backward, warps, stages, grid.
            blocks = pallas_attention.BlockSizes(block, block, *[cost.BLOCK_BACKWARD] * 4)
            options = (scale, True, blocks, "triton", None, 2, None, interpret)
            return pallas_attention.mha(q_BSKH, k_BSKH, v_BSKH, segment_ids_BS, *options)

        # The kernel wants as many keys as queries. `vmap` is one more dimension of its grid, over which k and v are
        # read again but not repeated in memory; their gradients are, for the time until they are summed over G.
        return jax.vmap(one_query_per_key, in_axes=(0, None, None))(q_GBSKH, k_BSKH, v_BSKH)

    return manual.differentiable(kernel, "attention_out")
