"""A mixture-of-experts Transformer as its mathematics has it: one process, dense, in float64. moejax is held to it.

It shares nothing with moejax but the configuration's classes: Python loops run over layers and experts, every token
visits every expert (with gate 0 where it was not routed), every pair of positions has a score, RoPE multiplies by
complex numbers. Parameters are those of moejax with the layers in one leading dim [L, ...] (`moejax.sharding`).

Dimensions: B batch, S sequence, T = B * S tokens, D model, N query heads, K key/value heads, H head, E experts, F
feed-forward, V vocabulary, L layers, G groups of tokens that meet, n tokens of one.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import BalanceConfig, ModelConfig


class CapacityRule(NamedTuple):
    """Drops: of the tokens that meet at a time, an expert takes those of the highest gates, `capacity` at most."""

    tokens_Gn: np.ndarray  # indices into the flattened [B * S] tokens, one row for those that meet
    capacity: int


class Figures(NamedTuple):
    """Of one mixture-of-experts layer: the router's losses, assignments to each expert, and how many were dropped."""

    aux_loss: Any
    sequence_loss: Any
    z_loss: Any
    load_E: Any
    dropped: Any


class Result(NamedTuple):
    """Figures in float64: scalars, and per mixture-of-experts layer assignments to each expert and dropped ones."""

    loss: Any
    cross_entropy: Any
    aux_loss: Any
    sequence_loss: Any
    z_loss: Any
    load_LE: Any
    dropped_L: Any


def capacity(num_tokens: int, factor: float, m: ModelConfig) -> int:
    """Rows of an expert in one sender's buffer: `factor` times its balanced load, and never more than the tokens."""
    return min(num_tokens, math.ceil(factor * (num_tokens * m.experts_per_token / m.num_experts)))


def _rms_norm(x: Any, scale_D: Any, eps: float) -> Any:
    return scale_D * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + eps)


def _rms_norm_whole(x_BSNH: Any, scale_NH: Any, eps: float) -> Any:
    """All heads of a token as one vector."""
    return _rms_norm(x_BSNH.reshape(*x_BSNH.shape[:2], -1), scale_NH.reshape(-1), eps).reshape(x_BSNH.shape)


def _silu(x: Any) -> Any:
    return x / (1 + jnp.exp(-x))


def _swiglu(x: Any, w_gate_DF: Any, w_up_DF: Any, w_down_FD: Any) -> Any:
    return (_silu(x @ w_gate_DF) * (x @ w_up_DF)) @ w_down_FD


def _frequency(m: ModelConfig, pair: int, num_pairs: int, seq_len: int) -> float:
    """Radians per token of one pair: theta^(-2i/R), stretched as the papers say."""
    s, frequency = m.rope.scaling, m.rope.theta ** (-pair / num_pairs)
    turns = s.original_max_seq_len * frequency / (2 * math.pi)
    if s.kind == "linear":
        return frequency / s.factor
    if s.kind == "llama3":
        smooth = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
        return frequency * (min(max(smooth, 0), 1) * (1 - 1 / s.factor) + 1 / s.factor)
    if s.kind == "yarn":
        assert s.truncate
        turned = [s.original_max_seq_len / (2 * math.pi * beta) for beta in (s.beta_fast, s.beta_slow)]
        fast, slow = (num_pairs * math.log(ratio, m.rope.theta) for ratio in turned)
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), 2 * num_pairs - 1)
        stretched = min(max((pair - low) / (high - low), 0), 1) if high > low else float(pair > low)
        return (1 - stretched) * frequency + stretched * frequency / s.factor
    if s.kind == "longrope":
        return frequency / (s.long_factors if seq_len > s.original_max_seq_len else s.short_factors)[pair]
    return frequency


def _rope(x_BSNH: Any, m: ModelConfig) -> Any:
    """Of R rotated dims, element i and i + R/2 make a complex number, turned by position * frequency."""
    seq_len, half = x_BSNH.shape[1], (m.rope.rotary_dim or x_BSNH.shape[3]) // 2
    s = m.rope.scaling
    size = s.attention_factor or {"yarn": 0.1 * math.log(s.factor) + 1}.get(s.kind, 1)
    frequency_H = np.array([_frequency(m, pair, half, seq_len) for pair in range(half)])
    turn_SH = size * np.exp(1j * np.arange(seq_len)[:, None] * frequency_H)
    z_BSNH = (x_BSNH[..., :half] + 1j * x_BSNH[..., half : 2 * half]) * turn_SH[None, :, None]
    return jnp.concatenate([z_BSNH.real, z_BSNH.imag, x_BSNH[..., 2 * half :]], axis=-1)


def _heads(p: Any, h_BSD: Any, m: ModelConfig) -> tuple[Any, Any, Any]:
    """Queries, keys and values, positions in the first two."""
    q_BSNH = jnp.tensordot(h_BSD, p["w_q_DNH"], 1)
    k_BSKH = jnp.tensordot(h_BSD, p["w_kv_DGKH"][:, 0], 1)
    v_BSKH = jnp.tensordot(h_BSD, p["w_kv_DGKH"][:, 1], 1)
    if m.attention.bias:
        q_BSNH, k_BSKH, v_BSKH = q_BSNH + p["b_q_NH"], k_BSKH + p["b_kv_GKH"][0], v_BSKH + p["b_kv_GKH"][1]
    if m.attention.qk_norm == "head":
        q_BSNH, k_BSKH = _rms_norm(q_BSNH, p["norm_q_H"], m.norm_eps), _rms_norm(k_BSKH, p["norm_k_H"], m.norm_eps)
    if m.attention.qk_norm == "projection":
        q_BSNH = _rms_norm_whole(q_BSNH, p["norm_q_NH"], m.norm_eps)
        k_BSKH = _rms_norm_whole(k_BSKH, p["norm_k_KH"], m.norm_eps)
    return _rope(q_BSNH, m), _rope(k_BSKH, m), v_BSKH


def _latent_heads(p: Any, h_BSD: Any, m: ModelConfig) -> tuple[Any, Any, Any]:
    """The same where a latent c makes them, one head at a time; W are a value's dims, R those that RoPE turns."""
    latent, c_BSQ = m.attention.latent, h_BSD
    fixed, c_BSJ = m.attention.head_dim - latent.rope_head_dim, h_BSD @ p["w_kv_down_DJ"]
    c_BSC = _rms_norm(c_BSJ[..., : latent.kv_rank], p["norm_kv_C"], 1e-6)
    k_BSR = _rope(c_BSJ[..., None, latent.kv_rank :], m)[:, :, 0]
    if latent.q_rank:
        c_BSQ = _rms_norm(h_BSD @ p["w_q_down_DQ"], p["norm_q_Q"], 1e-6)
    w_q_QNH = p["w_q_up_QNH"] if latent.q_rank else p["w_q_DNH"]
    queries, keys, values = [], [], []
    for n in range(m.attention.num_heads):
        q_BSH, kv_BSH = c_BSQ @ w_q_QNH[:, n], c_BSC @ p["w_kv_up_CNH"][:, n]
        q_BSR = _rope(q_BSH[..., None, fixed:], m)[:, :, 0]
        queries.append(jnp.concatenate([q_BSH[..., :fixed], q_BSR], axis=-1))
        keys.append(jnp.concatenate([kv_BSH[..., :fixed], k_BSR], axis=-1))
        values.append(kv_BSH[..., fixed:])
    return jnp.stack(queries, axis=2), jnp.stack(keys, axis=2), jnp.stack(values, axis=2)


def _attention(p: Any, x_BSD: Any, segment_ids_BS: Any, m: ModelConfig) -> Any:
    h_BSD = _rms_norm(x_BSD, p["norm_D"], m.norm_eps)
    q_BSNH, k_BSKH, v_BSKH = (_latent_heads if m.attention.latent.kv_rank else _heads)(p, h_BSD, m)
    kv_head_N = np.arange(m.attention.num_heads) // (m.attention.num_heads // m.attention.num_kv_heads)
    multiplier = m.attention.multiplier or 1 / math.sqrt(m.attention.head_dim)
    score_BNSS = jnp.einsum("bqnh,bknh->bnqk", q_BSNH, k_BSKH[:, :, kv_head_N]) * multiplier
    seen_SS = np.tril(np.ones((x_BSD.shape[1],) * 2, bool))
    seen_BSS = seen_SS[None] & (segment_ids_BS[:, :, None] == segment_ids_BS[:, None, :])
    weight_BNSS = jax.nn.softmax(jnp.where(seen_BSS[:, None], score_BNSS, -jnp.inf), axis=-1)
    o_BSNH = jnp.einsum("bnqk,bknh->bqnh", weight_BNSS, v_BSKH[:, :, kv_head_N])
    y_BSD = jnp.tensordot(o_BSNH, p["w_o_NHD"], 2)
    return y_BSD + p["b_o_D"] if m.attention.output_bias else y_BSD


def _kept(gate_TE: Any, tokens_Gn: Any, rows: int) -> Any:
    """Which of the positive gates are within capacity: fewer than `rows` rivals of the group come before them."""
    gate_GnE = gate_TE[tokens_Gn]
    mine, rival = gate_GnE[:, :, None], gate_GnE[:, None, :]
    n = tokens_Gn.shape[1]
    earlier = (np.arange(n)[None, :] < np.arange(n)[:, None])[None, :, :, None]
    before_GnE = ((rival > mine) | ((rival == mine) & earlier)).sum(2)
    kept_GnE = (gate_GnE > 0) & (before_GnE < rows)
    return jnp.zeros(gate_TE.shape, bool).at[tokens_Gn].set(kept_GnE)


def experts(p: Any, h_TD: Any, gate_TE: Any) -> Any:
    """Returns the sum over experts of what each makes of every token, times its gate."""
    y_TD = jnp.zeros_like(h_TD)
    for e in range(gate_TE.shape[1]):
        w_in_DGF, w_out_FD = p["w_in_EDGF"][e], p["w_out_EFD"][e]
        y_TD += gate_TE[:, e, None] * _swiglu(h_TD, w_in_DGF[:, 0], w_in_DGF[:, 1], w_out_FD)
    return y_TD


def _in_best_groups(value_TE: Any, m: ModelConfig) -> Any:
    """Which experts are in one of the groups of the highest sums of their two best values; without a bias, one."""
    groups, best = m.router.num_groups, 2 if m.router.bias else 1
    sorted_TGn = jnp.sort(value_TE.reshape(len(value_TE), groups, -1), axis=-1)
    rank_TG = jnp.argsort(jnp.argsort(-sorted_TGn[..., -best:].sum(-1), axis=-1, stable=True), axis=-1)
    return jnp.repeat(rank_TG < m.router.groups_per_token, m.num_experts // groups, axis=-1)


def mixture(p: Any, h_BSD: Any, m: ModelConfig, rule: CapacityRule | None = None) -> tuple[Any, Figures]:
    """Returns what a mixture-of-experts layer makes of its normalized input, without the residual, and its figures."""
    tokens_Gn, rows = rule or (None, None)
    h_TD = h_BSD.reshape(-1, h_BSD.shape[-1])
    logits_TE = h_TD @ p["w_router_DE"]
    score_TE = jax.nn.softmax(logits_TE, axis=-1) if m.router.score == "softmax" else 1 / (1 + jnp.exp(-logits_TE))
    prob_TE = score_TE / score_TE.sum(-1, keepdims=True)
    value_TE = score_TE + p.get("router_bias_E", 0.0)
    if m.router.num_groups > 1:
        value_TE = jnp.where(_in_best_groups(value_TE, m), value_TE, -jnp.inf)
    rank_TE = jnp.argsort(jnp.argsort(-value_TE, axis=-1, stable=True), axis=-1)
    chosen_TE = rank_TE < m.experts_per_token
    gate_TE = jnp.where(chosen_TE, score_TE, 0.0)
    if m.router.renormalize:
        gate_TE = gate_TE / gate_TE.sum(-1, keepdims=True)
    kept_TE = chosen_TE if rows is None else _kept(jax.lax.stop_gradient(gate_TE), tokens_Gn, rows)
    y_TD = experts(p["experts"], h_TD, m.router.scaling * jnp.where(kept_TE, gate_TE, 0.0))
    if m.shared_d_ff:
        shared = p["shared"]
        of_shared_TD = _swiglu(h_TD, shared["w_in_DGF"][:, 0], shared["w_in_DGF"][:, 1], shared["w_out_FD"])
        gate_T = 1 / (1 + jnp.exp(-h_TD @ shared["w_gate_D"])) if m.shared_gate else jnp.ones(len(h_TD))
        y_TD += gate_T[:, None] * of_shared_TD
    load_E = chosen_TE.sum(0)
    log_z_T = jnp.log(jnp.exp(logits_TE).sum(-1))
    aux_loss = m.num_experts * jnp.sum(load_E / load_E.sum() * prob_TE.mean(0))
    chosen_BSE, prob_BSE = (x_TE.reshape(*h_BSD.shape[:2], -1) for x_TE in (chosen_TE, prob_TE))
    share_BE = chosen_BSE.mean(1) / m.experts_per_token
    sequence_loss = m.num_experts * jnp.mean(jnp.sum(share_BE * prob_BSE.mean(1), axis=-1))
    dropped = (chosen_TE & ~kept_TE).sum()
    return y_TD.reshape(h_BSD.shape), Figures(aux_loss, sequence_loss, jnp.mean(log_z_T**2), load_E, dropped)


def _dense_layer(p: Any, x_BSD: Any, segment_ids_BS: Any, m: ModelConfig) -> Any:
    x_BSD += m.residual_multiplier * _attention(p["attention"], x_BSD, segment_ids_BS, m)
    h_BSD = _rms_norm(x_BSD, p["feed_forward_norm_D"], m.norm_eps)
    w_in_DGF, w_out_FD = p["feed_forward"]["w_in_DGF"], p["feed_forward"]["w_out_FD"]
    return x_BSD + m.residual_multiplier * _swiglu(h_BSD, w_in_DGF[:, 0], w_in_DGF[:, 1], w_out_FD)


def _moe_layer(p: Any, x_BSD: Any, segment_ids_BS: Any, m: ModelConfig, rule: CapacityRule | None) -> Any:
    x_BSD += m.residual_multiplier * _attention(p["attention"], x_BSD, segment_ids_BS, m)
    y_BSD, figures = mixture(p["moe"], _rms_norm(x_BSD, p["moe_norm_D"], m.norm_eps), m, rule)
    return x_BSD + m.residual_multiplier * y_BSD, figures


def _logits(params: Any, batch: Any, m: ModelConfig, rule: CapacityRule | None) -> tuple[Any, list[Any]]:
    x_BSD = m.embedding_multiplier * params["embed"]["table_VD"][batch["tokens"]]
    for i in range(m.num_dense_layers):
        p = jax.tree.map(lambda w, i=i: w[i], params["dense_layers"])
        x_BSD = _dense_layer(p, x_BSD, batch["segment_ids"], m)
    figures = []
    for i in range(m.num_layers - m.num_dense_layers):
        p = jax.tree.map(lambda w, i=i: w[i], params["layers"])
        x_BSD, of_layer = _moe_layer(p, x_BSD, batch["segment_ids"], m, rule)
        figures.append(of_layer)
    h_BSD = _rms_norm(x_BSD, params["head"]["norm_D"], m.norm_eps)
    w_DV = params["embed"]["table_VD"].T if m.tie_embeddings else params["head"]["w_DV"]
    return h_BSD @ w_DV / m.logits_divisor, figures


def _loss(params: Any, batch: Any, m: ModelConfig, balance: BalanceConfig, rule: CapacityRule | None) -> Any:
    logits_BSV, figures = _logits(params, batch, m, rule)
    log_prob_BSV = jax.nn.log_softmax(logits_BSV, axis=-1)
    counted_BS = batch["targets"] != -100
    target_BS = np.where(counted_BS, batch["targets"], 0)
    nats_BS = -jnp.take_along_axis(log_prob_BSV, target_BS[..., None], axis=-1)[..., 0]
    cross_entropy = jnp.sum(nats_BS * counted_BS) / max(counted_BS.sum(), 1)
    *of_router, load_LE, dropped_L = (jnp.stack(of_layers) for of_layers in zip(*figures, strict=True))
    aux_loss, sequence_loss, z_loss = map(jnp.mean, of_router)
    loss = cross_entropy + balance.aux_loss_weight * aux_loss + balance.z_loss_weight * z_loss
    loss += balance.sequence_loss_weight * sequence_loss
    return loss, Result(loss, cross_entropy, aux_loss, sequence_loss, z_loss, load_LE, dropped_L)


def in_float64(function: Any) -> Any:
    """Runs `function(params, ...)` in float64 under ordinary promotion and gives back NumPy arrays.

    Only the first argument, a tree of arrays, is converted.
    """

    @functools.wraps(function)
    def run(params: Any, *args: Any, **kwargs: Any) -> Any:
        with (
            jax.enable_x64(True),
            jax.default_device(jax.devices()[0]),
            jax.numpy_dtype_promotion("standard"),
            jax.numpy_rank_promotion("allow"),
        ):
            params = jax.tree.map(lambda w: jnp.asarray(np.asarray(w, np.float64)), params)
            return jax.tree.map(np.asarray, function(params, *args, **kwargs))

    return run


@in_float64
def logits(params: Any, batch: Any, m: ModelConfig, rule: CapacityRule | None = None) -> np.ndarray:
    """The logits of every position, [B, S, V]."""
    return _logits(params, batch, m, rule)[0]


@in_float64
def loss_and_grads(
    params: Any, batch: Any, m: ModelConfig, balance: BalanceConfig, rule: CapacityRule | None = None
) -> tuple[Result, Any]:
    """The loss with its parts, and the gradient of every parameter.

    Args:
        params: logical arrays, nested as moejax's, layers in one leading dim.
        batch: "tokens", "targets", "segment_ids": int32 [B, S]; targets of -100 are left out of the mean.
        m: the model.
        balance: the weights of the router's losses.
        rule: who drops what; None: nothing is dropped.
    """
    grads, result = jax.grad(_loss, has_aux=True)(params, batch, m, balance, rule)
    return result, grads
