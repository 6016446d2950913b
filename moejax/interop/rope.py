"""RoPE in a config.json of Hugging Face, which has had two forms.

Until transformers 5, `rope_theta` and `partial_rotary_factor` were fields of the model's, and `rope_scaling` was null
or an object. Since then one object, `rope_parameters`, has them all.
"""

from __future__ import annotations

import math
from typing import Any, get_args

from moejax.checks import check
from moejax.config import RopeConfig, RopeScaling, RopeScalingConfig
from moejax.interop.hf_config import HfConfig

_NAMES = {"default": "none"}  # kinds that moejax calls something else


def read_rope(
    c: HfConfig, head_dim: int, rotated: float = 1.0, theta: float | None = None, rotary_dim: int = 0
) -> RopeConfig:
    """Returns the RoPE of a config.json, in either form.

    `rotated` is the default of `partial_rotary_factor`, and `theta`, if the family has one, of `rope_theta`. A
    `rotary_dim` that the family has a field of decides before the factor.

    Raises:
      ConfigError: moejax doesn't have its kind, or a number is missing.
    """
    rope = c.objects("rope_scaling", "rope_parameters")
    theta = float(rope.number("rope_theta", default=theta))
    share = rope.number("partial_rotary_factor", default=rotated)
    rotary_dim = rotary_dim or int(head_dim * share)
    kinds = ["default", *get_args(RopeScaling)[1:]]
    kind = rope.choice("rope_type", "type", of=kinds, default="default")
    scaling = _read_scaling(rope, _NAMES.get(kind, kind), c.number("max_position_embeddings"))
    rope.finish()
    return RopeConfig(theta, 0 if rotary_dim == head_dim else rotary_dim, scaling)


def read_multiplier(c: HfConfig, head_dim: int) -> float:
    """Returns `AttentionConfig.multiplier` where YaRN raises it, as in DeepSeek's models; 0 elsewhere."""
    rope = c.objects("rope_scaling", "rope_parameters")
    scale_all = rope.number("mscale_all_dim", default=0)
    return head_dim**-0.5 * _mscale(scale_all, rope.number("factor")) ** 2 if scale_all else 0.0


def write_rope(rope: RopeConfig, head_dim: int, *, multiplier: float = 0.0) -> dict[str, Any]:
    """Returns the fields of config.json in the form that every version of transformers reads.

    `multiplier` is what YaRN raises the scores by, relative to the usual head_dim**-0.5; 0 if it doesn't.
    """
    rotary_dim = rope.rotary_dim or head_dim
    fields: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": _write_scaling(rope.scaling, multiplier)}
    return fields | ({"partial_rotary_factor": rotary_dim / head_dim} if rotary_dim < head_dim else {})


def _read_scaling(c: HfConfig, kind: str, max_seq_len: int) -> RopeScalingConfig:
    if kind == "none":
        c.skip("original_max_position_embeddings")
        return RopeScalingConfig()
    if kind == "linear":
        c.skip("original_max_position_embeddings")
        return RopeScalingConfig("linear", float(c.number("factor")))
    original = c.count("original_max_position_embeddings", default=max_seq_len)
    factor = float(c.number("factor", default=max_seq_len / original))
    check(factor > 0, f"{c.source} has a scaling of RoPE with factor={factor}; it must be positive")
    if kind == "llama3":
        low, high = float(c.number("low_freq_factor")), float(c.number("high_freq_factor"))
        return RopeScalingConfig("llama3", factor, original, low_freq_factor=low, high_freq_factor=high)
    attention_factor = float(c.number("attention_factor", default=0.0))
    if kind == "longrope":
        return RopeScalingConfig(
            "longrope", factor, original, attention_factor=attention_factor,
            short_factors=c.numbers("short_factor"), long_factors=c.numbers("long_factor"),
        )  # fmt: skip
    scale, scale_all = c.number("mscale", default=0), c.number("mscale_all_dim", default=0)
    if scale and scale_all and not attention_factor:
        attention_factor = _mscale(scale, factor) / _mscale(scale_all, factor)
    return RopeScalingConfig(
        "yarn", factor, original, attention_factor=attention_factor,
        beta_fast=float(c.number("beta_fast", default=32)), beta_slow=float(c.number("beta_slow", default=1)),
        truncate=c.flag("truncate", default=True),
    )  # fmt: skip


def _mscale(scale: float, factor: float) -> float:
    """Returns what YaRN multiplies with where sequences get longer by `factor`, at a strength of `scale`."""
    return 0.1 * scale * math.log(factor) + 1


def _write_scaling(s: RopeScalingConfig, multiplier: float) -> dict[str, Any] | None:
    if s.kind == "none":
        return None
    fields: dict[str, Any] = {"rope_type": s.kind, "factor": s.factor}
    if s.kind != "linear":
        fields["original_max_position_embeddings"] = s.original_max_seq_len
    if s.kind == "llama3":
        fields |= {"low_freq_factor": s.low_freq_factor, "high_freq_factor": s.high_freq_factor}
    if s.kind == "yarn":
        fields |= {"beta_fast": s.beta_fast, "beta_slow": s.beta_slow, "truncate": s.truncate}
    if s.kind == "longrope":
        fields |= {"short_factor": list(s.short_factors), "long_factor": list(s.long_factors)}
    if s.kind == "yarn" and multiplier > 1 and s.factor > 1:
        # To the digits that files have it with: of the number itself, not of the multiplier made from it.
        fields["mscale_all_dim"] = round((math.sqrt(multiplier) - 1) / (0.1 * math.log(s.factor)), 9)
        if s.attention_factor == 1:  # as DeepSeek's files say it, and as programs other than transformers read it
            return fields | {"mscale": fields["mscale_all_dim"]}
    return fields | ({"attention_factor": s.attention_factor} if s.attention_factor else {})
