import dataclasses

import pytest

from moejax.checks import ConfigError
from moejax.config import AttentionConfig, LatentConfig, ModelConfig
from moejax.planner.flops import ceilings, decode_flops, forward_flops
from moejax.planner.hardware import Cluster, get_device
from moejax.presets import moe_16x10b

CLUSTER = Cluster("a100_64gb_2x8", get_device("a100_64gb"), 2, 8)


def test_the_ceilings_of_the_reference_cluster():
    """16 devices × 240 TFLOP/s × 55% ÷ 4 GFLOP."""
    found = ceilings(CLUSTER, 4e9)
    assert (found.forward, found.training, found.training_with_full_remat) == pytest.approx((528, 176, 132))
    assert str(found) == (
        "16 devices × 240 TFLOP/s × 55% ÷ 4 GFLOP per token = 528,000 tokens/s forward; ÷ 3 = 176,000 in training, "
        "÷ 4 = 132,000 in training with full rematerialization"
    )


def test_the_reference_model_costs_what_the_design_says():
    costs = [forward_flops(moe_16x10b(), n) / 1e9 for n in (128, 10_240)]
    assert costs == pytest.approx([3.43, 4.43], abs=0.01)


def test_flops_by_hand():
    m = ModelConfig(
        num_layers=3, num_dense_layers=1, dense_d_ff=7, d_model=8, attention=AttentionConfig(2, 1, 4), d_ff=5,
        num_experts=4, experts_per_token=2, shared_d_ff=3, shared_gate=True, vocab_size=11,
    )  # fmt: skip
    attention = 8 * 8 + 2 * 8 * 4 + 8 * 8
    moe = 2 * 3 * 8 * 5 + 3 * 8 * 3 + 8 + 8 * 4
    params = 3 * attention + 2 * moe + 3 * 8 * 7 + 8 * 11
    seen = (1 + 2 + 3 + 4 + 5) / 5
    assert forward_flops(m, 5) == 2 * params + 3 * 2 * 2 * 8 * seen
    assert decode_flops(m, 4) == 2 * params + 3 * 2 * 2 * 8 * 5


def test_flops_of_latent_attention_by_hand():
    """Training sees keys and values, 6 and 3 wide; decoding sees latents of 5, and the 2 rotated dims of keys."""
    m = ModelConfig(
        num_layers=3, d_model=8, attention=AttentionConfig(2, 2, 6, latent=LatentConfig(5, 7, 2, 3)), d_ff=5,
        num_experts=4, experts_per_token=2, vocab_size=11,
    )  # fmt: skip
    attention = 8 * 7 + 7 * 2 * 6 + 8 * (5 + 2) + 5 * 2 * (4 + 3) + 2 * 3 * 8
    params = 3 * (attention + 2 * 3 * 8 * 5 + 8 * 4) + 8 * 11
    assert forward_flops(m, 5) == 2 * params + 3 * 2 * 2 * (6 + 3) * 3
    assert decode_flops(m, 4) == 2 * params + 3 * 2 * 2 * (5 + 2 + 5) * 5


def test_a_sequence_is_its_tokens_decoded_one_by_one():
    m = dataclasses.replace(moe_16x10b(), num_layers=2)
    assert sum(decode_flops(m, n) for n in range(64)) == pytest.approx(64 * forward_flops(m, 64))


def test_a_wrong_efficiency_is_named():
    with pytest.raises(ConfigError, match="efficiency=55 must be"):
        ceilings(CLUSTER, 4e9, 55)
