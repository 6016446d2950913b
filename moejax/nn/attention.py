"""Attention, heads split over `tensor`, the sequence split over `tensor` outside of it.

Dimensions: b this device's sequences of a microbatch, S sequence, s = S / tensor, D model, n and k this device's query
and key/value heads, H head, G=2 (key, value). Of latent attention: Q latent of queries, C latent of keys and values,
R the part of a head that is rotated, J = C + R, W the width of a head's values.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import AttentionKind, ModelConfig, QkNorm
from moejax.kernels.attention import attention as attention_kernel
from moejax.mesh import TENSOR
from moejax.nn.collectives import all_gather, psum_scatter
from moejax.nn.norm import rms_norm, rms_norm_heads
from moejax.nn.rope import apply_rope, rope_table
from moejax.nn.scale import scaled
from moejax.nn.weights import compute_copy
from moejax.remat import MATMUL, named

LATENT_EPS = 1e-6  # of the norms of latents; DeepSeek's models have this whatever the eps of their other norms


def attention(p: dict[str, Any], x_bsD: jax.Array, segment_ids_bS: jax.Array, m: ModelConfig) -> jax.Array:
    """Causal self-attention within segments; returns what to add to the residual stream, [b, s, D]."""
    with jax.named_scope("attention"):
        h_bSD = all_gather(rms_norm(x_bsD, p["norm_D"], m.norm_eps), TENSOR, dim=1)
        o_bSnH = _ATTENTIONS[m.attention.kind](p, h_bSD, segment_ids_bS, m)
        y_bSD = jnp.einsum("bsnh,nhd->bsd", o_bSnH, compute_copy(p["w_o_NHD"], h_bSD))
        return _add_bias(psum_scatter(y_bSD, TENSOR, dim=1), p.get("b_o_D"))  # after the sum, so that it counts once


def _grouped(p: dict[str, Any], h_bSD: jax.Array, segment_ids_bS: jax.Array, m: ModelConfig) -> jax.Array:
    """Attends with query heads that share keys and values in groups; returns the results of this device's heads."""
    q_bSnH = _project("bsd,dnh->bsnh", h_bSD, p["w_q_DNH"])
    kv_bSGkH = _project("bsd,dgkh->bsgkh", h_bSD, p["w_kv_DGKH"])
    q_bSnH, kv_bSGkH = _add_bias(q_bSnH, p.get("b_q_NH")), _add_bias(kv_bSGkH, p.get("b_kv_GKH"))
    q_bSnH, k_bSkH = _QK_NORMS[m.attention.qk_norm](p, q_bSnH, kv_bSGkH[:, :, 0], m.norm_eps)
    cos, sin = rope_table(h_bSD.shape[1], m.rotary_dim, m.rope)
    q_bSnH, k_bSkH = apply_rope(q_bSnH, cos, sin), apply_rope(k_bSkH, cos, sin)
    q_bSnH = scaled(q_bSnH, m.attention.query_scale)
    return attention_kernel(q_bSnH, k_bSkH, kv_bSGkH[:, :, 1], segment_ids_bS)


def _latent(p: dict[str, Any], h_bSD: jax.Array, segment_ids_bS: jax.Array, m: ModelConfig) -> jax.Array:
    """Attends with keys and values made from a latent of each token (MLA, arXiv 2405.04434, eq. 9 to 19)."""
    H, W, R = m.attention.head_dim, m.attention.value_dim, m.rotary_dim
    q_bSnH = _latent_queries(p, h_bSD)
    kv_bSJ = _project("bsd,dj->bsj", h_bSD, p["w_kv_down_DJ"])
    c_bSC, k_bSR = jnp.split(kv_bSJ, [m.attention.latent.kv_rank], axis=-1)
    kv_bSnH = _project("bsc,cnh->bsnh", rms_norm(c_bSC, p["norm_kv_C"], LATENT_EPS), p["w_kv_up_CNH"])
    (q_fixed, q_rotated), (k_fixed, v_bSnW) = (jnp.split(x_bSnH, [H - R], axis=-1) for x_bSnH in (q_bSnH, kv_bSnH))
    cos, sin = rope_table(h_bSD.shape[1], R, m.rope)
    k_rotated = jnp.broadcast_to(apply_rope(k_bSR[:, :, None], cos, sin), (*k_fixed.shape[:-1], R))
    q_bSnH = jnp.concatenate([q_fixed, apply_rope(q_rotated, cos, sin)], axis=-1)
    k_bSnH = jnp.concatenate([k_fixed, k_rotated], axis=-1)
    # The kernels have one width for keys and values. Zeros behind the values give zeros behind the results.
    v_bSnH = jnp.pad(v_bSnW, ((0, 0), (0, 0), (0, 0), (0, H - W)))
    q_bSnH = scaled(q_bSnH, m.attention.query_scale)
    return attention_kernel(q_bSnH, k_bSnH, v_bSnH, segment_ids_bS)[..., :W]


def _latent_queries(p: dict[str, Any], h_bSD: jax.Array) -> jax.Array:
    """Returns queries [b, S, n, H], made from a latent where the model has one for them."""
    if "w_q_DNH" in p:
        return _project("bsd,dnh->bsnh", h_bSD, p["w_q_DNH"])
    c_bSQ = _project("bsd,dq->bsq", h_bSD, p["w_q_down_DQ"])
    return _project("bsq,qnh->bsnh", rms_norm(c_bSQ, p["norm_q_Q"], LATENT_EPS), p["w_q_up_QNH"])


_ATTENTIONS: dict[AttentionKind, Callable[..., jax.Array]] = {"grouped": _grouped, "latent": _latent}


def _project(equation: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """Multiplies with a weight; the result is what a rematerialization policy may keep."""
    return named(jnp.einsum(equation, x, compute_copy(w, x)), MATMUL)


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
