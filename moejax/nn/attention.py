"""Grouped-query attention, heads split over `tensor`, the sequence split over `tensor` outside of it.

Dimensions: b this device's sequences of a microbatch, S sequence, s = S / tensor, D model, n and k this device's query
and key/value heads, H head, G=2 (key, value).
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.kernels.attention import attention as attention_kernel
from moejax.mesh import TENSOR
from moejax.nn.collectives import all_gather, psum_scatter
from moejax.nn.norm import rms_norm
from moejax.nn.rope import apply_rope, rope_table
from moejax.nn.weights import compute_copy
from moejax.remat import MATMUL, named


def attention(p: dict[str, Any], x_bsD: jax.Array, segment_ids_bS: jax.Array, m: ModelConfig) -> jax.Array:
    """Causal self-attention within segments; returns what to add to the residual stream, [b, s, D]."""
    with jax.named_scope("attention"):
        h_bSD = all_gather(rms_norm(x_bsD, p["norm_D"], m.norm_eps), TENSOR, dim=1)
        q_bSnH = named(jnp.einsum("bsd,dnh->bsnh", h_bSD, compute_copy(p["w_q_DNH"], h_bSD)), MATMUL)
        kv_bSGkH = named(jnp.einsum("bsd,dgkh->bsgkh", h_bSD, compute_copy(p["w_kv_DGKH"], h_bSD)), MATMUL)
        cos, sin = rope_table(h_bSD.shape[1], m.attention.head_dim, m.rope.theta)
        q_bSnH, k_bSkH = apply_rope(q_bSnH, cos, sin), apply_rope(kv_bSGkH[:, :, 0], cos, sin)
        o_bSnH = attention_kernel(q_bSnH, k_bSkH, kv_bSGkH[:, :, 1], segment_ids_bS)
        y_bSD = jnp.einsum("bsnh,nhd->bsd", o_bSnH, compute_copy(p["w_o_NHD"], h_bSD))
        return psum_scatter(y_bSD, TENSOR, dim=1)
