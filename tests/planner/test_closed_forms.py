"""The closed forms of a step are its program's counts, to the byte and the FLOP, on layouts that are drawn."""

import dataclasses
import functools
import random
from collections import Counter

import pytest
from draws import draw_step

from moejax.checks import ConfigError
from moejax.config import AttentionConfig, LatentConfig, ModelConfig, RouterConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.planner.program import param_bytes, work
from moejax.planner.work import Collective, Matmul, MemoryOp
from moejax.presets import moe_16x10b
from moejax.profiling.step_counts import count_step

EXACT = 1e-12  # of a sum of floats
counted = functools.cache(count_step)


def by_pass(items):
    flops, sent = Counter(), Counter()
    for item in items:
        if isinstance(item, Matmul):
            flops[item.phase, item.pass_] += item.flops
        elif isinstance(item, Collective) and item.sent_bytes:
            sent[item.phase, item.pass_, item.kind, item.axes] += item.sent_bytes
    return flops, sent


def over_passes(counts):
    total = Counter()
    for (phase, _, *more), number in counts.items():
        total[(phase, *more) if more else phase] += number
    return dict(total)


def assert_same(model, layout, mode="train"):
    items, counts = work(model, layout, mode), counted(model, layout, mode)
    flops, sent = by_pass(items)
    assert dict(flops) == pytest.approx(counts.flops_by_pass, rel=EXACT)
    assert dict(sent) == pytest.approx(counts.sent_by_pass, rel=EXACT)
    assert over_passes(flops) == pytest.approx(counts.flops, rel=EXACT)
    assert over_passes(sent) == pytest.approx(counts.sent_bytes, rel=EXACT)
    assert param_bytes(model, layout) == counts.param_bytes


def check_drawn(seed, number):
    rng = random.Random(seed)
    for i in range(number):
        step = draw_step(rng)
        try:
            assert_same(*step)
        except AssertionError as e:
            raise AssertionError(f"step {i} of MOEJAX_TEST_SEED={seed}: {step}\n{e}") from e


@pytest.mark.full
def test_closed_forms_are_the_programs_counts(seed):
    check_drawn(seed, 3)  # 2 to 3 s each, all of it jax's tracing


@pytest.mark.slow
def test_closed_forms_are_the_programs_counts_of_200_steps(seed):
    check_drawn(seed, 200)


# Whatever is drawn: each policy, strategy and gather.
MODEL = ModelConfig(
    num_layers=5, d_model=32, attention=AttentionConfig(4, 4, 16), d_ff=16, num_experts=8, shared_d_ff=24,
    num_dense_layers=1, dense_d_ff=40, router=RouterConfig(bias=True),
)  # fmt: skip
NORMED = dataclasses.replace(
    MODEL, attention=dataclasses.replace(MODEL.attention, qk_norm="projection", bias=True, output_bias=True),
    shared_gate=True, residual_multiplier=0.22, logits_divisor=6.0,
)  # fmt: skip
LATENT = dataclasses.replace(
    MODEL, attention=AttentionConfig(4, 4, 24, latent=LatentConfig(16, 8, 4, 12)),
    router=RouterConfig(bias=True, num_groups=4, groups_per_token=2),
)  # fmt: skip
UNRANKED = dataclasses.replace(LATENT, attention=AttentionConfig(4, 4, 24, latent=LatentConfig(16, 0, 4, 12)))
FOUR_AXES = MeshConfig(expert=2, pipeline=2, tensor=2, replica=2, hardware="h100", hosts=4)
LAYOUT = Layout(FOUR_AXES, 32, 16)
CORNERS = {
    "none": (MODEL, LAYOUT.replace(remat="none", gather="layer")),
    "collectives": (
        MODEL,
        LAYOUT.replace(
            remat="collectives", pipeline_repeats=2, strategy="capacity", expert_axes=("expert",), hierarchical=True
        ),
    ),
    "full": (
        MODEL,
        LAYOUT.replace(remat="full", gather="layer", strategy="ragged", hierarchical=True, wire_dtype="float8"),
    ),
    "counted ahead": (  # for a load-balance loss over two slices
        dataclasses.replace(MODEL, router=RouterConfig(), tie_embeddings=True),
        Layout(FOUR_AXES, 32, 32, grad_accumulation_steps=2, remat="minimal", gather="layer"),
    ),
    "uneven": (dataclasses.replace(MODEL, num_layers=MODEL.num_layers + 1), LAYOUT.replace(remat="minimal")),
    "one device": (MODEL, Layout(MeshConfig(hardware="tpu_v5p"), 32, 4, remat="minimal")),
    "variants": (NORMED, LAYOUT.replace(remat="collectives", gather="layer")),
    "variants again": (NORMED, LAYOUT.replace(remat="full")),
    "latent": (LATENT, LAYOUT.replace(remat="collectives", gather="layer")),
    "latent again": (UNRANKED, LAYOUT.replace(remat="full")),
    "latent on a TPU": (LATENT, Layout(MeshConfig(tensor=2, hardware="tpu_v5p"), 32, 4, remat="minimal")),
    "prefill": (NORMED, LAYOUT, "prefill"),
}


@pytest.mark.parametrize("step", CORNERS.values(), ids=CORNERS)
def test_corners(step):
    assert_same(*step)


def test_the_reference_model():
    mesh = MeshConfig(expert=8, pipeline=2, hardware="h100", hosts=2, host_axis="pipeline")
    assert_same(moe_16x10b(), Layout(mesh, 4096, 64, num_microbatches=4))


def test_memory_operations_are_less_than_the_unfused_program_moves():
    """An upper bound for them, in the phases that are swept; matrix products move the rest."""
    step = CORNERS["full"]
    moved, swept = counted(*step, "train").moved_bytes, Counter()
    for item in work(*step):
        if isinstance(item, MemoryOp):
            swept[item.phase] += item.moved_bytes * item.times
    assert swept.keys() <= moved.keys()
    assert all(0 < swept[phase] < moved[phase] for phase in swept)


def test_what_cannot_be_counted_says_so():
    with pytest.raises(ConfigError, match="mode='decode' has no program"):
        work(MODEL, Layout(MeshConfig(), 32, 2), "decode")
    with pytest.raises(ConfigError, match="batch_size=3 must be a multiple"):
        work(MODEL, Layout(FOUR_AXES, 32, 3))
