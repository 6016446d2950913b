"""Causal grouped-query attention in plain jax: the CPU backend, and the oracle of the other backends.

Dims: B batch, S sequence, N query heads, K key-value heads, G = N // K query heads that share one of them, H head_dim;
c the chunk, n the number of chunks; q and t are the query and the key position inside a chunk.

Blocks of c × c logits are visited one at a time with an online softmax, only those that causality leaves, and once more
in the backward pass (FlashAttention-2, https://arxiv.org/abs/2307.08691, algorithms 1 and 2): nothing grows with S².
Both passes are one `scan` over the list of blocks, so a walk of the jaxpr counts exactly the FLOPs that are executed; a
row of up to `CHUNK` tokens is a list of one, which the compiler unrolls into a fused step.

Forward and backward of 10,240 tokens (B=1, N=4, K=2, H=32, float32) take 2.1 to 2.4 s on two CPU cores that others
share, and 53 MB: 10.5 of arguments, 10.5 of results, 32 of temporaries. The S × S logits alone would be 1.7 GB.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from moejax.kernels import manual

# Logits of a block stay in the cache: at 256 tokens and more, up to twice as fast as 256 or 512. 64 gains another 0–25%
# at head_dim 16 and 32, for four times the steps.
CHUNK = 128
_MASKED = -1e30  # finite, so that a row in which a whole block is masked has no inf - inf

# An oracle must not round its products; on CPU this costs nothing.
_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def attention(
    q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array, *, chunk: int = CHUNK
) -> jax.Array:
    """Causal attention inside segments, see `moejax.kernels.attention.attention`. `chunk` is in tokens.

    Every product and the softmax are at least float32; the result has q's dtype.
    """
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2]
    dtype = q_BSNH.dtype if q_BSNH.dtype.itemsize > 4 else jnp.float32
    q_BSKGH = (q_BSNH.astype(dtype) * H**-0.5).reshape(B, S, K, N // K, H)
    inputs = manual.vary_alike(q_BSKGH, k_BSKH.astype(dtype), v_BSKH.astype(dtype), segment_ids_BS)
    o_BSKGH = _attend(chunk, *inputs)
    return o_BSKGH.reshape(B, S, N, H).astype(q_BSNH.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    chunk: int, q_BSKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array
) -> jax.Array:
    return _forward(chunk, q_BSKGH, k_BSKH, v_BSKH, segment_ids_BS)[0]


def _forward(
    chunk: int, q_BSKGH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    S = segment_ids_BS.shape[1]
    q_nBKGcH, k_nBKcH, v_nBKcH, segment_ids_nBc = _split_all(chunk, q_BSKGH, k_BSKH, v_BSKH, segment_ids_BS)

    def block(carry: Any, pair: Any) -> tuple[Any, None]:
        i, j = pair
        o, peak, total = (_at(x, i) for x in carry)
        logits = _logits(q_nBKGcH, k_nBKcH, segment_ids_nBc, i, j)
        new_peak = jnp.maximum(peak, logits.max(-1))
        weights = jnp.exp(logits - new_peak[..., None])
        shrink = jnp.exp(peak - new_peak)
        total = total * shrink + weights.sum(-1)
        o = o * shrink[..., None] + _einsum("bkgqt,bkth->bkgqh", weights, _at(v_nBKcH, j))
        return tuple(_put(x, new, i) for x, new in zip(carry, (o, new_peak, total), strict=True)), None

    zero_nBKGc = jnp.zeros_like(q_nBKGcH[..., 0])
    start = (jnp.zeros_like(q_nBKGcH), zero_nBKGc + _MASKED, zero_nBKGc)
    (o_nBKGcH, peak_nBKGc, total_nBKGc), _ = lax.scan(block, start, _pairs(len(q_nBKGcH)))
    # Named here, not by the caller, for the backward pass needs both: with only the result saved, a remat policy would
    # have to run the forward pass again to get at the logarithms.
    o_BSKGH = checkpoint_name(_merge(o_nBKGcH / total_nBKGc[..., None], S), "attention_out")
    log_total_nBKGc = checkpoint_name(peak_nBKGc + jnp.log(total_nBKGc), "attention_out")
    return o_BSKGH, (q_BSKGH, k_BSKH, v_BSKH, segment_ids_BS, o_BSKGH, log_total_nBKGc)


def _backward(chunk: int, saved: tuple[jax.Array, ...], g_BSKGH: jax.Array) -> tuple[jax.Array | None, ...]:
    *inputs, o_BSKGH, log_total_nBKGc = saved
    S = o_BSKGH.shape[1]
    q_nBKGcH, k_nBKcH, v_nBKcH, segment_ids_nBc = _split_all(chunk, *inputs)
    g_nBKGcH = _split(g_BSKGH, chunk)
    weighted_nBKGc = (g_nBKGcH * _split(o_BSKGH, chunk)).sum(-1)

    def block(carry: Any, pair: Any) -> tuple[Any, None]:
        dq_nBKGcH, dk_nBKcH, dv_nBKcH = carry
        i, j = pair
        q, g, k, v = _at(q_nBKGcH, i), _at(g_nBKGcH, i), _at(k_nBKcH, j), _at(v_nBKcH, j)
        logits = _logits(q_nBKGcH, k_nBKcH, segment_ids_nBc, i, j)
        weights = jnp.exp(logits - _at(log_total_nBKGc, i)[..., None])
        dweights = _einsum("bkgqh,bkth->bkgqt", g, v)
        dlogits = weights * (dweights - _at(weighted_nBKGc, i)[..., None])
        dq = _at(dq_nBKGcH, i) + _einsum("bkgqt,bkth->bkgqh", dlogits, k)
        dk = _at(dk_nBKcH, j) + _einsum("bkgqt,bkgqh->bkth", dlogits, q)
        dv = _at(dv_nBKcH, j) + _einsum("bkgqt,bkgqh->bkth", weights, g)
        return (_put(dq_nBKGcH, dq, i), _put(dk_nBKcH, dk, j), _put(dv_nBKcH, dv, j)), None

    start = tuple(jnp.zeros_like(x) for x in (q_nBKGcH, k_nBKcH, v_nBKcH))
    grads, _ = lax.scan(block, start, _pairs(len(q_nBKGcH)))
    return *(_merge(x, S) for x in grads), None


_attend.defvjp(_forward, _backward)


def _pairs(n: int) -> tuple[np.ndarray, np.ndarray]:
    """The (query, key) chunks that causality leaves; a row starts on its diagonal, where every token sees itself."""
    pairs = np.array([(i, j) for i in range(n) for j in range(i, -1, -1)], np.int32)
    return pairs[:, 0], pairs[:, 1]


def _logits(
    q_nBKGcH: jax.Array, k_nBKcH: jax.Array, segment_ids_nBc: jax.Array, i: jax.Array, j: jax.Array
) -> jax.Array:
    c = segment_ids_nBc.shape[-1]
    position_c = lax.iota(jnp.int32, c)
    allowed_Bcc = _at(segment_ids_nBc, i)[:, :, None] == _at(segment_ids_nBc, j)[:, None, :]
    allowed_Bcc &= ((i * c + position_c)[:, None] >= (j * c + position_c)[None, :])[None]
    logits = _einsum("bkgqh,bkth->bkgqt", _at(q_nBKGcH, i), _at(k_nBKcH, j))
    return jnp.where(allowed_Bcc[:, None, None], logits, _MASKED)


def _split_all(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(_split(x, chunk) for x in arrays)


def _split(x_BSR: jax.Array, chunk: int) -> jax.Array:
    """[B, S, heads..., H] or [B, S] -> [n, B, heads..., c, H] or [n, B, c], padded at the end, hidden by causality."""
    B, S, *rest = x_BSR.shape
    n = -(-S // chunk)
    c = -(-S // n)  # even chunks: 513 tokens are 2 × 257, not 2 × 512
    x_BSR = jnp.pad(x_BSR, ((0, 0), (0, n * c - S), *((0, 0) for _ in rest)))
    x_nBcR = jnp.moveaxis(x_BSR.reshape(B, n, c, *rest), 1, 0)
    return jnp.moveaxis(x_nBcR, 2, -2) if rest else x_nBcR


def _merge(x_nBRcH: jax.Array, S: int) -> jax.Array:
    """Undoes `_split` for an array with heads: [n, B, heads..., c, H] -> [B, S, heads..., H]."""
    x_BncRH = jnp.moveaxis(jnp.moveaxis(x_nBRcH, -2, 2), 0, 1)
    B, n, c, *rest = x_BncRH.shape
    return x_BncRH.reshape(B, n * c, *rest)[:, :S]


def _at(x_nX: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_index_in_dim(x_nX, i, keepdims=False)


def _put(x_nX: jax.Array, new_X: jax.Array, i: jax.Array) -> jax.Array:
    return lax.dynamic_update_index_in_dim(x_nX, new_X, i, 0)
