"""Rotary position embedding (arXiv 2104.09864), on halves as Llama and Mixtral have it."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import RopeConfig, RopeScaling
from moejax.nn.scale import scaled


def rope_table(seq_len: int, rotary_dim: int, rope: RopeConfig) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [1, seq_len, 1, rotary_dim / 2], of positions 0 … seq_len - 1.

    Attention only sees position differences, and packed documents do not see each other, so positions need not
    restart at a document.
    """
    frequency, factor = frequencies(seq_len, rotary_dim, rope)
    angle = jnp.arange(seq_len, dtype=jnp.float32)[:, None] * frequency.astype(np.float32)[None, :]
    cos, sin = scaled(jnp.cos(angle), factor), scaled(jnp.sin(angle), factor)
    return cos[None, :, None, :], sin[None, :, None, :]


def apply_rope(x_BSNH: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates each pair (i, i + R/2) of a head's R leading dims by its position's angle; computed in float32.

    The table is for R dims. Those after them stay as they are, for any position.
    """
    half = cos.shape[-1]
    a, b, rest = jnp.split(x_BSNH.astype(jnp.float32), (half, 2 * half), axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x_BSNH.dtype)


def frequencies(seq_len: int, rotary_dim: int, rope: RopeConfig) -> tuple[np.ndarray, float]:
    """Returns the radians that each pair turns by from token to token, float64 [rotary_dim / 2], falling.

    Also returns what to multiply cos and sin with. `seq_len` decides between the two sets of LongRoPE.
    """
    unscaled = rope.theta ** (-np.arange(0, rotary_dim, 2) / rotary_dim)
    return _SCALINGS[rope.scaling.kind](unscaled, rope, seq_len)


def _unscaled(frequency: np.ndarray, rope: RopeConfig, seq_len: int) -> tuple[np.ndarray, float]:
    return frequency, 1.0


def _linear(frequency: np.ndarray, rope: RopeConfig, seq_len: int) -> tuple[np.ndarray, float]:
    return frequency / rope.scaling.factor, 1.0


def _llama3(frequency: np.ndarray, rope: RopeConfig, seq_len: int) -> tuple[np.ndarray, float]:
    s = rope.scaling
    waves = s.original_max_seq_len * frequency / (2 * math.pi)  # in the original sequence
    kept = (waves - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    return _blend(frequency, kept, s.factor), 1.0


def _yarn(frequency: np.ndarray, rope: RopeConfig, seq_len: int) -> tuple[np.ndarray, float]:
    s, pairs = rope.scaling, len(frequency)

    def pair_of(turns: float) -> float:
        """The pair, as a real number, that turns so often over the original sequence."""
        return pairs * math.log(s.original_max_seq_len / (turns * 2 * math.pi)) / math.log(rope.theta)

    first, last = pair_of(s.beta_fast), pair_of(s.beta_slow)
    if s.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last = max(last, first + 1e-3)  # or there is nothing to blend over
    kept = (last - np.arange(pairs)) / (last - first)
    return _blend(frequency, kept, s.factor), s.attention_factor or 0.1 * math.log(s.factor) + 1


def _longrope(frequency: np.ndarray, rope: RopeConfig, seq_len: int) -> tuple[np.ndarray, float]:
    s = rope.scaling
    divisors = s.long_factors if seq_len > s.original_max_seq_len else s.short_factors
    by_factor = math.sqrt(1 + math.log(s.factor) / math.log(s.original_max_seq_len))
    return frequency / np.array(divisors), s.attention_factor or by_factor


def _blend(frequency: np.ndarray, kept: np.ndarray, factor: float) -> np.ndarray:
    """Divides by `factor` what is not kept: all of a frequency at 0 and below, nothing at 1 and above."""
    kept = np.clip(kept, 0, 1)
    return kept * frequency + (1 - kept) * frequency / factor


_SCALINGS: dict[RopeScaling, Callable[[np.ndarray, RopeConfig, int], tuple[np.ndarray, float]]] = {
    "none": _unscaled,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
