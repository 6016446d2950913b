"""Causal grouped-query attention inside segments: one name, a backend for each platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from moejax.kernels.attention import reference
from moejax.kernels.platform import implementation_for

Implementation = Literal["reference", "gpu", "tpu"]

_BY_PLATFORM: dict[str, Implementation] = {"cpu": "reference", "cuda": "gpu", "gpu": "gpu", "tpu": "tpu"}


def attention_implementation(platform: str | None = None) -> Implementation:
    """The implementation that `attention` uses on `platform`: "cpu", "cuda" (or "gpu") or "tpu".

    None means the platform that the surrounding program is for, see `moejax.kernels.platform`.
    """
    return implementation_for("attention", _BY_PLATFORM, platform)


def attention(
    q_BSNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    segment_ids_BS: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(H)) v, where a token sees itself and the earlier tokens of its own segment.

    Query head i uses key-value head i // (N // K). Positions of one segment need not be contiguous. Works on the
    per-device arrays inside `jax.shard_map` (with `check_vma=True`, its default) as well as outside, and can be
    differentiated with respect to q, k and v.

    Args:
      q_BSNH: queries [batch, sequence, query heads, head_dim], not yet scaled; float32, bfloat16 or float16.
      k_BSKH: keys [batch, sequence, key-value heads, head_dim], q's dtype.
      v_BSKH: values, k's shape and dtype.
      segment_ids_BS: integers [batch, sequence]; which document of a packed row a token belongs to.
      implementation: "reference", "gpu" or "tpu"; None for `attention_implementation()`.

    Returns:
      [batch, sequence, query heads, head_dim] in q's dtype; the softmax is taken in float32. What the backward pass
      needs of it carries the `checkpoint_name` "attention_out", for rematerialization policies.

    Raises:
      ValueError: an argument has the wrong shape or dtype, or `implementation` is unknown.
    """
    _check(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS)
    if implementation is None:
        implementation = attention_implementation()
    with jax.named_scope("attention"):
        return _load(implementation)(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS)


@functools.cache
def _load(implementation: str) -> Callable[..., jax.Array]:
    # Imported when used: the kernel libraries cost a second to import and bring nothing to a CPU run.
    if implementation == "reference":
        return reference.attention
    if implementation == "gpu":
        from moejax.kernels.attention import gpu

        return gpu.attention
    if implementation == "tpu":
        from moejax.kernels.attention import tpu

        return tpu.attention
    raise ValueError(
        f"implementation={implementation!r} must be one of {', '.join(map(repr, get_args(Implementation)))}"
    )


def _check(q_BSNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, segment_ids_BS: jax.Array) -> None:
    if q_BSNH.ndim != 4:
        raise ValueError(f"q_BSNH has shape {q_BSNH.shape}; must be [batch, sequence, heads, head_dim]")
    B, S, N, H = q_BSNH.shape
    K = k_BSKH.shape[2] if k_BSKH.ndim == 4 else 0
    if not K or k_BSKH.shape != (B, S, K, H):
        raise ValueError(f"k_BSKH has shape {k_BSKH.shape}; must be ({B}, {S}, kv_heads, {H}) for q's {q_BSNH.shape}")
    if v_BSKH.shape != k_BSKH.shape:
        raise ValueError(f"v_BSKH has shape {v_BSKH.shape}; must be k's {k_BSKH.shape}")
    if N % K:
        divisors = [d for d in range(1, N + 1) if N % d == 0]
        raise ValueError(f"num_heads={N} must be a multiple of num_kv_heads={K}; use one of {divisors} key-value heads")
    if segment_ids_BS.shape != (B, S):
        raise ValueError(f"segment_ids_BS has shape {segment_ids_BS.shape}; must be ({B}, {S})")
    if not jnp.issubdtype(segment_ids_BS.dtype, jnp.integer):
        raise ValueError(f"segment_ids_BS has dtype {segment_ids_BS.dtype}; must be an integer, for example int32")
    if not jnp.issubdtype(q_BSNH.dtype, jnp.floating) or {k_BSKH.dtype, v_BSKH.dtype} != {q_BSNH.dtype}:
        dtypes = f"{q_BSNH.dtype}, {k_BSKH.dtype}, {v_BSKH.dtype}"
        raise ValueError(f"q, k and v have dtypes {dtypes}; must be one floating-point dtype, for example bfloat16")
