import jax.numpy as jnp
import pytest

from moejax.checks import ConfigError
from moejax.config import ModelConfig
from moejax.presets import PRESETS, get_preset, mixtral_8x7b, moe_16x10b, tiny


def parameters(model, experts):
    """Parameters by hand, of which `experts` experts a layer: attention, router, experts, norms, two tables."""
    heads = 2 * model.attention.num_heads + 2 * model.attention.num_kv_heads
    layer = model.d_model * (heads * model.attention.head_dim + 3 * experts * model.d_ff + model.num_experts + 2)
    return model.num_layers * layer + (2 * model.vocab_size + 1) * model.d_model


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_model(name):
    model = get_preset(name)
    assert isinstance(model, ModelConfig)
    assert PRESETS[name].__doc__
    assert model.dtype == ("float32" if name in ("tiny", "small") else "bfloat16")
    jnp.dtype(model.dtype)


@pytest.mark.parametrize(
    ("model", "total", "active"), [(moe_16x10b(), 10.26e9, 1.808e9), (mixtral_8x7b(), 46.7e9, 12.88e9)]
)
def test_sizes_are_the_published_ones(model, total, active):
    assert parameters(model, model.num_experts) == pytest.approx(total, rel=1e-3)
    assert parameters(model, model.experts_per_token) == pytest.approx(active, rel=1e-3)


def test_tiny_is_what_a_cpu_can_train():
    assert parameters(tiny(), tiny().num_experts) < 10e6


def test_unknown_preset_lists_the_names():
    with pytest.raises(ConfigError, match="preset 'huge' does not exist; use one of tiny, small, moe_16x10b"):
        get_preset("huge")
