"""Grouped-query attention, heads split over `tensor`, the sequence split over `tensor` outside of it.

Dimensions: b this device's sequences of a microbatch, S sequence, s = S / tensor, D model, n and k this device's query
and key/value heads, H head, G=2 (key, value).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig, QkNorm
from moejax.kernels.attention import attention as attention_kernel
from moejax.mesh import TENSOR
from moejax.nn.collectives import all_gather, psum_scatter
from moejax.nn.norm import rms_norm, rms_norm_heads
from moejax.nn.rope import apply_rope, rope_table
from moejax.nn.scale import scaled
from moejax.nn.weights import compute_copy
from moejax.remat import MATMUL, named


def attention(p: dict[str, Any], x_bsD: jax.Array, segment_ids_bS: jax.Array, m: ModelConfig) -> jax.Array:
    """Causal self-attention within segments; returns what to add to the residual stream, [b, s, D]."""
    with jax.named_scope("attention"):
        h_bSD = all_gather(rms_norm(x_bsD, p["norm_D"], m.norm_eps), TENSOR, dim=1)
        q_bSnH = named(jnp.einsum("bsd,dnh->bsnh", h_bSD, compute_copy(p["w_q_DNH"], h_bSD)), MATMUL)
        kv_bSGkH = named(jnp.einsum("bsd,dgkh->bsgkh", h_bSD, compute_copy(p["w_kv_DGKH"], h_bSD)), MATMUL)
        q_bSnH, kv_bSGkH = _add_bias(q_bSnH, p.get("b_q_NH")), _add_bias(kv_bSGkH, p.get("b_kv_GKH"))
        q_bSnH, k_bSkH = _QK_NORMS[m.attention.qk_norm](p, q_bSnH, kv_bSGkH[:, :, 0], m.norm_eps)
        cos, sin = rope_table(h_bSD.shape[1], m.rope.rotary_dim or m.attention.head_dim, m.rope)
        q_bSnH, k_bSkH = apply_rope(q_bSnH, cos, sin), apply_rope(k_bSkH, cos, sin)
        q_bSnH = scaled(q_bSnH, m.attention.query_scale)
        o_bSnH = attention_kernel(q_bSnH, k_bSkH, kv_bSGkH[:, :, 1], segment_ids_bS)
        y_bSD = jnp.einsum("bsnh,nhd->bsd", o_bSnH, compute_copy(p["w_o_NHD"], h_bSD))
        return _add_bias(psum_scatter(y_bSD, TENSOR, dim=1), p.get("b_o_D"))  # after the sum, so that it counts once


def _add_bias(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Adds a bias of the last dims; None stands for a model without one."""
    return x if bias is None else x + compute_copy(bias, x).reshape((1,) * (x.ndim - bias.ndim) + bias.shape)


def _norm_nothing(p: dict[str, Any], q_bSnH: jax.Array, k_bSkH: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    return q_bSnH, k_bSkH


def _norm_each_head(p: dict[str, Any], q_bSnH: jax.Array, k_bSkH: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    return rms_norm(q_bSnH, p["norm_q_H"], eps), rms_norm(k_bSkH, p["norm_k_H"], eps)


def _norm_all_heads(p: dict[str, Any], q_bSnH: jax.Array, k_bSkH: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    return rms_norm_heads(q_bSnH, p["norm_q_NH"], eps), rms_norm_heads(k_bSkH, p["norm_k_KH"], eps)


_QK_NORMS: dict[QkNorm, Callable[..., tuple[jax.Array, jax.Array]]] = {
    "none": _norm_nothing,
    "head": _norm_each_head,
    "projection": _norm_all_heads,
}
