"""Counts of the train step where they are plain, and of the forward pass."""

import functools

import pytest

from moejax.checks import ConfigError
from moejax.config import AttentionConfig, ModelConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.planner.jaxpr import OTHER
from moejax.presets import moe_16x10b
from moejax.profiling.step_counts import count_step

MODEL = ModelConfig(num_layers=2, d_model=32, attention=AttentionConfig(4, 2, 16), d_ff=16, num_experts=8)


@pytest.mark.parametrize("hardware", ["cpu", "h100", "tpu_v5p"])
def test_nothing_of_a_step_is_outside_the_phases(hardware):
    mesh = MeshConfig(expert=2, tensor=2, pipeline=2, replica=2, hardware=hardware)
    found = count_step(MODEL, Layout(mesh, 32, 8, remat="full"))
    assert OTHER not in found.flops
    assert all(phase != OTHER for phase, *_ in found.sent_bytes)
    assert found.moved_bytes[OTHER] < 0.05 * sum(found.moved_bytes.values())
    assert {pass_ for _, pass_ in found.flops_by_pass} == {"forward", "recompute", "backward"}


def test_without_rematerialization_no_product_is_done_twice():
    mesh = MeshConfig(expert=4, tensor=2, pipeline=2, hardware="h100")
    found = count_step(MODEL, Layout(mesh, 32, 8, remat="none"))
    assert {pass_ for _, pass_ in found.flops_by_pass} == {"forward", "backward"}


@functools.cache
def reference():
    """The reference model on 16 devices of the expert axis, one sequence each: no bubble."""
    mesh = MeshConfig(expert=16, hardware="h100")
    return count_step(moe_16x10b(), Layout(mesh, 1024, 16, num_microbatches=1, remat="full"))


def test_the_reference_model_by_hand():
    found, m, tokens = reference(), moe_16x10b(), 1024
    projections = 2 * tokens * 3072 * 128 * (2 * 24 + 2 * 8)
    scores = 2 * 2 * tokens * tokens * 128 * 24 / 2
    capacity = 192  # of an expert: 1.5 times 1024 * 2 / 16
    experts = 2 * (16 * capacity) * 3 * m.d_model * m.d_ff
    forward = {
        "attention": m.num_layers * (projections + scores),
        "expert": m.num_layers * experts,
        "logits": 2 * tokens * m.d_model * m.vocab_size,
    }
    for phase, value in forward.items():
        assert found.flops_by_pass[phase, "forward"] == found.flops_by_pass[phase, "recompute"] == value
    assert found.flops_by_pass["expert", "backward"] == 2 * forward["expert"]
    # The kernel's backward pass has 5 products where its forward pass has 2: it makes the scores again.
    backward = m.num_layers * (2 * projections + 2.5 * scores)
    assert found.flops_by_pass["attention", "backward"] == backward
    exchanged = 2 * m.num_layers * 16 * capacity * m.d_model * 2 * 15 / 16  # forward and again
    assert found.sent_bytes["dispatch", "all_to_all", ("expert",)] == exchanged * 3 / 2
    assert (
        found.sent_bytes["dispatch", "all_to_all", ("expert",)]
        == found.sent_bytes["combine", "all_to_all", ("expert",)]
    )
    assert found.param_bytes == pytest.approx(4 * 10.27e9 / 16, rel=2e-3)


def test_a_program_for_4096_devices_can_be_counted_where_there_are_none():
    mesh = MeshConfig(replica=256, expert=16, hardware="tpu_v5p")
    found = count_step(moe_16x10b(), Layout(mesh, 1024, 4096, num_microbatches=1, remat="full"))
    assert found.flops["expert"] == reference().flops["expert"]
    assert found.sent_bytes["gather", "all_reduce", ("replica",)] > 0


def test_prefill_is_the_forward_pass_alone():
    mesh = MeshConfig(expert=16, hardware="h100")
    found = count_step(moe_16x10b(), Layout(mesh, 1024, 16, num_microbatches=1), "prefill")
    for phase in ("attention", "expert"):
        assert found.flops[phase] == reference().flops_by_pass[phase, "forward"]
    assert {pass_ for _, pass_ in found.flops_by_pass} == {"forward"}


def test_what_cannot_be_counted_says_so():
    with pytest.raises(ConfigError, match="mode='decode' has no program"):
        count_step(MODEL, Layout(MeshConfig(), 32, 2), "decode")
    with pytest.raises(ConfigError, match="batch_size=3 must be a multiple of 2"):
        count_step(MODEL, Layout(MeshConfig(), 32, 3))
