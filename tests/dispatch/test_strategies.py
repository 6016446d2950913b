"""Every strategy equals the dense layer in float64, forward and in every gradient, whatever the routing and the mesh.

A handful of layouts together cover every option; one per strategy is fast. The grid of the slow tier is every
factorization of 16 into expert × pipeline × tensor, with folded and split experts, one hop and two over every number of
hosts, and 1, 2 and 4 chunks:

    pytest -m slow tests/dispatch/test_strategies.py
"""

import dataclasses
import itertools

import jax
import numpy as np
import pytest
from cases import relative_error
from moe_layer import E, K, Layer, T, dense, make_tokens, make_weights, rounds_by_hand
from tiers import full_unless

from moejax.dispatch import STRATEGIES

TOLERANCE = 1e-5  # of the largest value; float32 against float64


def balanced(num_tokens):
    """Every expert gets one or two assignments of each device."""
    first = np.arange(num_tokens) % T * K
    return np.stack([first % E, (first + 1) % E], axis=1)


def skewed(num_tokens):
    """Some experts far more popular than others, and a tenth of the tokens goes nowhere."""
    rng = np.random.default_rng(0)
    score = 2 * rng.random(E) + rng.gumbel(size=(num_tokens, E))
    expert = np.argsort(-score, axis=-1)[:, :K]
    expert[rng.random(num_tokens) < 0.1] = E
    return expert


def single(num_tokens):
    """Every token picks the same two."""
    return np.tile([[5, 9]], (num_tokens, 1))


def empty(num_tokens):
    """Half of the experts, and with them some devices, get nothing; one device's tokens all pick the same two."""
    expert = balanced(num_tokens) % (E // 2)
    expert[:T] = [0, 3]
    return expert


def nowhere(num_tokens):
    """No token goes anywhere."""
    return np.full((num_tokens, K), E)


ROUTINGS = (balanced, skewed, single, empty, nowhere)
# Room for all: nothing is dropped, so that the shared expectations hold.
ROOM = {"capacity": T}


def layouts(strategy, *layers):
    return [
        dataclasses.replace(layer, strategy=strategy, capacity=ROOM.get(strategy, layer.capacity)) for layer in layers
    ]


def errors(layer, expert_NK, results, grads):
    """Relative errors by name."""
    weights, (x_ND, cotangent_ND) = make_weights(), make_tokens(layer.num_tokens)
    y_ND, expected_grads = dense(weights, x_ND, expert_NK, cotangent_ND, depth=layer.depth)
    found = jax.tree.map(relative_error, {"y": results, "grad": grads}, {"y": y_ND, "grad": expected_grads})
    return {jax.tree_util.keystr(path): error for path, error in jax.tree.leaves_with_path(found)}


def check(layer, routing):
    expert_NK = routing(layer.num_tokens).astype(np.int32)
    x_ND, cotangent_ND = make_tokens(layer.num_tokens)
    (y_ND, dropped_d, rounds_d), grads = layer.program(make_weights(), x_ND, expert_NK, cotangent_ND)
    found = errors(layer, expert_NK, y_ND, grads)
    assert {name: error for name, error in found.items() if not error < TOLERANCE} == {}
    times = max(layer.depth, 1)
    np.testing.assert_array_equal(dropped_d, times * (expert_NK == E).reshape(-1, T * K).sum(-1))
    np.testing.assert_array_equal(rounds_d, times * rounds_by_hand(layer, expert_NK))


# Together: each axis alone and all at once, replicas, both places for experts, two hops over 2, 4 and 8 hosts, on one
# axis and on the pair, every number of chunks; buffers so small that the skewed routings take several rounds.
CI_LAYERS = (
    Layer(1, 1, 1, capacity=3),
    Layer(16, 1, 1, hosts=4, chunks=2),
    Layer(1, 16, 1, capacity=1),
    Layer(4, 2, 2, hosts=2),
    Layer(4, 2, 2, hosts=4, chunks=4, capacity=4, folded=False),
    Layer(1, 4, 4, chunks=2),
    Layer(8, 1, 2, hosts=8, capacity=5),
    Layer(2, 2, 2, replica=2, hosts=2, folded=False),
)
EVERY_LAYER = [
    Layer(expert, pipeline, tensor, capacity=4, folded=folded, hosts=hosts, chunks=chunks)
    for expert, pipeline, tensor in itertools.product((1, 2, 4, 8, 16), repeat=3)
    if expert * pipeline * tensor == 16
    for folded in (True, False)
    for hosts in (1, 2, 4, 8, 16)
    if expert % hosts == 0
    for chunks in (1, 2, 4)
]


# What capacity adds is in test_capacity.py; the rest of it is dropless'.
CI = [x for s in STRATEGIES for x in layouts(s, *CI_LAYERS[:: 2 if s == "capacity" else 1])]


def is_fast(layer):
    """Of each strategy one on all axes, in two hops."""
    return layer.expert == 4 and layer.folded == (layer.strategy != "capacity")


@pytest.mark.parametrize("layer", full_unless(is_fast, CI, slow=CI[1::2].__contains__), ids=str)
def test_every_strategy_equals_the_dense_layer(layer):
    for routing in ROUTINGS:
        check(layer, routing)


@pytest.mark.slow
@pytest.mark.parametrize("layer", [x for s in STRATEGIES for x in layouts(s, *EVERY_LAYER)], ids=str)
def test_on_every_mesh(layer):
    layer = dataclasses.replace(layer)  # its program goes when this test does
    for routing in ROUTINGS:
        check(layer, routing)


POLICIES = ("none", "minimal", "collectives", "full")


@pytest.mark.parametrize(
    ("strategy", "policy"),
    full_unless(
        ("dropless", "full").__eq__,
        [*(("dropless", policy) for policy in POLICIES), ("capacity", "full"), ("ragged", "none"), ("ragged", "full")],
        slow=[("dropless", "none"), ("dropless", "minimal"), ("ragged", "none")].__contains__,
    ),
)
def test_inside_a_checkpointed_scan_over_a_cond(strategy, policy):
    """Stages that are idle exchange nothing, those that work take the rounds that their own tokens need."""
    (layer,) = layouts(strategy, Layer(2, 2, 4, hosts=2, depth=2, policy=policy))
    for routing in (single, empty):
        check(layer, routing)


@pytest.mark.full
def test_float8_rounds_the_same_rows_whatever_the_strategy():
    """Buffers or ragged slices: what travels towards the experts is the same rows, each rounded by itself."""
    expert_NK = skewed(16 * T).astype(np.int32)
    x_ND, cotangent_ND = make_tokens(16 * T)
    results = [
        dataclasses.replace(layer, wire_dtype="float8").program(make_weights(), x_ND, expert_NK, cotangent_ND)
        for strategy in STRATEGIES
        for layer in layouts(strategy, Layer(4, 2, 2, hosts=2, folded=False))
    ]
    (expected, *_), expected_grads = results[0]
    for (y_ND, *_), grads in results[1:]:
        found = jax.tree.map(relative_error, (y_ND, grads), (expected, expected_grads))
        assert max(jax.tree.leaves(found)) < TOLERANCE
