"""What a rematerialization policy saves and repeats, read off the traced gradient.

That no policy changes a gradient is in test_equivalence.py.
"""

import collections
import dataclasses
import itertools
import math

import pytest
from cases import UNEVEN, Case, variant
from jax.extend.core import jaxprs_in_params
from tiers import full_unless

from moejax.mesh import EXPERT

COLLECTIVES = ("all_gather", "all_to_all", "pmax", "ppermute", "psum", "psum_invariant", "psum2", "reduce_scatter")
POLICIES = ("none", "minimal", "collectives", "full")
EVERYTHING = variant(num_layers=6, num_dense_layers=2, dense_d_ff=24, shared_d_ff=16)
CASES = [
    Case(4, 2, 2, gather="layer", repeats=2, bubble="compute"),
    Case(4, 2, 2, gather="layer", repeats=2),
    Case(2, 2, 4, folded=False, model=EVERYTHING),
]


def count_collectives(jaxpr, times=1):
    """(name, mesh axes) -> number of executions of the collectives in a jaxpr, when one round is enough."""
    counts = collections.Counter()
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name in COLLECTIVES:
            counts[name, equation.params.get("axis_name") or equation.params["axes"]] += times
        trips = {"scan": equation.params.get("length"), "while": 0}.get(name, 1)  # a dispatch's further rounds
        for inner in jaxprs_in_params(equation.params):
            counts += count_collectives(inner, times * trips)
    return counts


def saved_bytes(jaxpr):
    """What the per-device program's loops stack up for later, which in a gradient is what they save."""
    (program,) = [e.params["jaxpr"] for e in jaxpr.eqns if e.primitive.name == "shard_map"]
    loops = [e for e in program.eqns if e.primitive.name == "scan"]
    # What is stacked has a dim more outside of the loop's body than inside; what is carried has not.
    results = [(out.aval, v.aval) for e in loops for out, v in zip(e.outvars, e.params["jaxpr"].outvars, strict=True)]
    return sum(math.prod(x.shape) * x.dtype.itemsize for x, inside in results if x.ndim > inside.ndim)


def gathers_weights(name, axes):
    return name == "all_gather" and EXPERT in axes


def split(counts):
    """The counts of activations' collectives, and the number of gathered weights."""
    weights = sum(count for key, count in counts.items() if gathers_weights(*key))
    return {key: count for key, count in counts.items() if not gathers_weights(*key)}, weights


@pytest.fixture(scope="module", params=full_unless(CASES[1].__eq__, CASES), ids=str)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def traces(case):
    return {policy: dataclasses.replace(case, remat=policy).trace() for policy in POLICIES}


@pytest.mark.parametrize("policy", ["minimal", "collectives"])
def test_what_crossed_the_network_is_not_sent_again(traces, policy):
    activations, _ = split(count_collectives(traces[policy]))
    saving_all, _ = split(count_collectives(traces["none"]))
    assert saving_all["ppermute", ("pipeline",)] > 0
    assert activations == saving_all


def test_full_sends_everything_again(traces):
    repeating, _ = split(count_collectives(traces["full"]))
    saving_all, _ = split(count_collectives(traces["none"]))
    exchanges = [key for key in saving_all if key[0] == "all_to_all"]
    assert len(exchanges) == 1
    assert 2 * repeating[exchanges[0]] == 3 * saving_all[exchanges[0]]
    assert sum(repeating.values()) > sum(saving_all.values())


def test_no_policy_gathers_a_weight_more_than_twice(traces):
    counts = {policy: count_collectives(trace) for policy, trace in traces.items()}
    # Each gather has one scatter of its gradient.
    once = sum(n for (name, axes), n in counts["none"].items() if name == "reduce_scatter" and EXPERT in axes)
    assert once > 0
    assert all(split(of_policy)[1] <= 2 * once for of_policy in counts.values())


def test_each_policy_saves_less_than_the_one_before(traces):
    saved = [saved_bytes(traces[policy]) for policy in POLICIES]
    assert all(more > less > 0 for more, less in itertools.pairwise(saved)), saved


def test_full_saves_the_layers_inputs_alone(traces, case):
    """And no weight: the pipeline's loop has them as constants, but what it saves is stacked, once a tick."""
    m, stages = case.model, case.pipeline
    row = case.seq_len // case.tensor * m.d_model * 4
    sequences = case.batch_size // case.expert
    ticks = case.layout.ticks
    inputs = ticks * m.num_moe_layers // (stages * case.repeats) * sequences // case.num_microbatches * row
    inputs += m.num_dense_layers * sequences // stages * row + sequences * row  # the last: inputs of the logits
    assert saved_bytes(traces["full"]) == pytest.approx(inputs, rel=0.2)


@pytest.mark.full
@pytest.mark.parametrize("policy", ["none", "full"])
def test_places_without_a_layer_save_nothing_more(policy):
    saved, of_even = (
        saved_bytes(dataclasses.replace(UNEVEN, remat=policy, model=model).trace())
        for model in (UNEVEN.model, dataclasses.replace(UNEVEN.model, num_layers=16))
    )
    assert saved == pytest.approx(of_even, rel=0.02)


@pytest.mark.parametrize("policy", POLICIES)
def test_skipping_the_bubble_saves_nothing_more(policy):
    skip, compute = (
        saved_bytes(dataclasses.replace(CASES[0], remat=policy, bubble=bubble).trace())
        for bubble in ("skip", "compute")
    )
    assert skip == pytest.approx(compute, rel=0.02)
