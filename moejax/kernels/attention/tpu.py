"""Causal grouped-query attention on TPUs: the splash attention kernel that comes with jax.

Splash attention skips the blocks that causality masks, shares a key-value head among its query heads without repeating
it, and takes segment ids.

Dims: B batch, S sequence, N query heads, K key-value heads, H head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from moejax.kernels import manual

_LANES = 128  # a block is a multiple of the width of a vector register
_BLOCKS = (512, 256, 128)  # tokens; larger ones load fewer bytes a product, 512 fits the vector memory at head_dim 256


def attention(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array, *, interpret: bool = False
) -> jax.Array:
    """Causal attention inside segments, see `moejax.kernels.attention.attention`.

    `interpret` evaluates the kernel's body with plain jax operations, on any device: slow, for tests.
    """
    S, H = q_BSNH.shape[1], q_BSNH.shape[3]
    extra = -S % _LANES

    def arrange(x_BSXH: jax.Array) -> jax.Array:  # padded at the end, where causality hides the tokens
        return jnp.swapaxes(jnp.pad(x_BSXH, ((0, 0), (0, extra), (0, 0), (0, 0))), 1, 2)

    q_BNSH = arrange(q_BSNH * H**-0.5)
    segment_ids_BS = jnp.pad(segment_ids_BS, ((0, 0), (0, extra)))
    o_BNSH = _kernel(interpret)(q_BNSH, arrange(k_BSKH), arrange(v_BSKH), segment_ids_BS)
    return jnp.swapaxes(o_BNSH, 1, 2)[:, :S]


@functools.cache
def _kernel(interpret: bool) -> Callable[..., jax.Array]:
    def kernel(q_BNSH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        N, S = q_BNSH.shape[1:3]
        size = next(size for size in _BLOCKS if S % size == 0)
        splash = splash_attention.make_splash_mha_single_device(
            splash_attention.MultiHeadMask([splash_attention.CausalMask((S, S))] * N),
            block_sizes=splash_attention.BlockSizes(
                block_q=size, block_kv=size, block_q_dkv=size, block_kv_dkv=size, block_q_dq=size, block_kv_dq=size
            ),
            interpret=interpret,
        )

        def one_row(q_NSH: jax.Array, k_KSH: jax.Array, v_KSH: jax.Array, segment_ids_S: jax.Array) -> jax.Array:
            return splash(q_NSH, k_KSH, v_KSH, splash_attention.SegmentIds(segment_ids_S, segment_ids_S))

        return jax.vmap(one_row)(q_BNSH, k_BKSH, v_BKSH, segment_ids_BS)

    return manual.differentiable(kernel, "attention_out")
