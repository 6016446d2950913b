"""The closed forms of a step are its trace, to the byte and the FLOP, on plans drawn anew in every run."""

import dataclasses
import functools
import random
from collections import Counter

import pytest
from plans import draw_plan

from moejax.config import ConfigError, DispatchConfig, ModelConfig, ParallelConfig
from moejax.mesh import MeshConfig
from moejax.planner.plan import Plan
from moejax.planner.program import param_bytes, work
from moejax.planner.trace import trace
from moejax.planner.work import Collective, Matmul, MemoryOp
from moejax.presets import moe_16x10b

EXACT = 1e-12  # of a sum of floats
traced = functools.cache(trace)


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


def assert_same(plan):
    items, counted = work(plan), traced(plan)
    flops, sent = by_pass(items)
    assert dict(flops) == pytest.approx(counted.flops_by_pass, rel=EXACT)
    assert dict(sent) == pytest.approx(counted.sent_by_pass, rel=EXACT)
    assert over_passes(flops) == pytest.approx(counted.flops, rel=EXACT)
    assert over_passes(sent) == pytest.approx(counted.sent_bytes, rel=EXACT)
    assert param_bytes(plan) == counted.param_bytes


def check_drawn(seed, number):
    rng = random.Random(seed)
    for i in range(number):
        plan = draw_plan(rng)
        try:
            assert_same(plan)
        except AssertionError as e:
            raise AssertionError(f"plan {i} of MOEJAX_TEST_SEED={seed}: {plan}\n{e}") from e


@pytest.mark.full
def test_closed_forms_are_the_trace(seed):
    check_drawn(seed, 5)  # 2 to 3 s each, all of it jax's tracing


@pytest.mark.slow
def test_closed_forms_are_the_trace_of_200_plans(seed):
    check_drawn(seed, 200)


# Whatever is drawn: each policy, strategy and gather.
MODEL = ModelConfig(
    num_layers=5, d_model=32, num_heads=4, num_kv_heads=4, head_dim=16, d_ff=16, num_experts=8, shared_d_ff=24,
    num_dense_layers=1, dense_d_ff=40, router_bias=True,
)  # fmt: skip
FOUR_AXES = MeshConfig(expert=2, pipeline=2, tensor=2, replica=2, hardware="h100", hosts=4)
CORNERS = {
    "none": Plan(MODEL, FOUR_AXES, 32, 16, ParallelConfig(remat="none", gather="layer")),
    "collectives": Plan(
        MODEL, FOUR_AXES, 32, 16, ParallelConfig(remat="collectives", repeats=2),
        DispatchConfig("capacity", expert_axes=("expert",), hosts=2),
    ),
    "full": Plan(
        MODEL, FOUR_AXES, 32, 16, ParallelConfig(remat="full", gather="layer"),
        DispatchConfig("ragged", hosts=2, payload="float8"),
    ),
    "counted ahead": Plan(  # for a load-balance loss over two slices
        dataclasses.replace(MODEL, router_bias=False, tie_embeddings=True), FOUR_AXES, 32, 32,
        ParallelConfig(remat="minimal", gather="layer"), accumulate=2,
    ),
    "one device": Plan(MODEL, MeshConfig(hardware="tpu_v5p"), 32, 4, ParallelConfig(remat="minimal")),
    "prefill": Plan(MODEL, FOUR_AXES, 32, 16, mode="prefill"),
}  # fmt: skip


@pytest.mark.parametrize("plan", CORNERS.values(), ids=CORNERS)
def test_corners(plan):
    assert_same(plan)


def test_the_reference_model():
    mesh = MeshConfig(expert=8, pipeline=2, hardware="h100", hosts=2, host_axis="pipeline")
    assert_same(Plan(moe_16x10b(), mesh, 4096, 64, ParallelConfig(num_microbatches=4)))


def test_memory_operations_are_less_than_the_unfused_program_moves():
    """An upper bound for them, in the phases that are swept; matrix products move the rest."""
    plan = CORNERS["full"]
    moved, swept = traced(plan).moved_bytes, Counter()
    for item in work(plan):
        if isinstance(item, MemoryOp):
            swept[item.phase] += item.moved_bytes * item.times
    assert swept.keys() <= moved.keys()
    assert all(0 < swept[phase] < moved[phase] for phase in swept)


def test_what_cannot_be_counted_says_so():
    with pytest.raises(ConfigError, match="mode='decode' has no program"):
        work(Plan(MODEL, MeshConfig(), 32, 2, mode="decode"))
    with pytest.raises(ConfigError, match="batch_size=3 must be a multiple"):
        work(Plan(MODEL, FOUR_AXES, 32, 3))
