"""Named models: functions that return a `ModelConfig`."""

from __future__ import annotations

from collections.abc import Callable

from moejax.checks import ConfigError
from moejax.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig


def tiny() -> ModelConfig:
    """6.6 M parameters over bytes: trains on a laptop's CPU in minutes; float32, which CPUs compute fastest."""
    return ModelConfig(
        num_layers=4,
        d_model=128,
        attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=32),
        d_ff=256,
        num_experts=16,
        experts_per_token=2,
        router=RouterConfig(score="sigmoid", bias=True),
        vocab_size=256,
        dtype="float32",
    )


def small() -> ModelConfig:
    """15 M parameters over bytes: a quarter of an hour on a CPU; float32."""
    return ModelConfig(
        num_layers=6,
        d_model=192,
        attention=AttentionConfig(num_heads=6, num_kv_heads=2, head_dim=32),
        d_ff=256,
        num_experts=16,
        experts_per_token=2,
        router=RouterConfig(score="sigmoid", bias=True),
        vocab_size=256,
        dtype="float32",
    )


def moe_16x10b() -> ModelConfig:
    """The reference model: 10.3 B parameters, 1.8 B of them active, for 16 accelerators."""
    return ModelConfig(
        num_layers=16,
        d_model=3072,
        attention=AttentionConfig(num_heads=24, num_kv_heads=8, head_dim=128),
        d_ff=4096,
        num_experts=16,
        experts_per_token=2,
        router=RouterConfig(score="sigmoid", bias=True),
        vocab_size=32_000,
        max_seq_len=10_240,
        dtype="bfloat16",
    )


def mixtral_8x7b() -> ModelConfig:
    """Mixtral 8x7B (arXiv 2401.04088, table 1): 46.7 B parameters, 12.9 B of them active."""
    return ModelConfig(
        num_layers=32,
        d_model=4096,
        attention=AttentionConfig(num_heads=32, num_kv_heads=8, head_dim=128),
        d_ff=14_336,
        num_experts=8,
        experts_per_token=2,
        vocab_size=32_000,
        max_seq_len=32_768,
        rope=RopeConfig(theta=1e6),
        norm_eps=1e-5,
        dtype="bfloat16",
    )


def olmoe_7b() -> ModelConfig:
    """OLMoE-1B-7B (arXiv 2409.02060, table 10): 6.9 B parameters, 1.3 B of them active, many small experts."""
    return ModelConfig(
        num_layers=16,
        d_model=2048,
        attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128, qk_norm="projection"),
        d_ff=1024,
        num_experts=64,
        experts_per_token=8,
        router=RouterConfig(renormalize=False),
        vocab_size=50_304,
        max_seq_len=4096,
        norm_eps=1e-5,
        dtype="bfloat16",
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    function.__name__: function for function in (tiny, small, moe_16x10b, mixtral_8x7b, olmoe_7b)
}


def get_preset(name: str) -> ModelConfig:
    """The model called `name`.

    Raises:
      ConfigError: there is none of that name.
    """
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; use one of {', '.join(PRESETS)}")
    return PRESETS[name]()
