"""Capacity drops, of each expert's assignments over all senders of a replica, those of the lowest gates beyond it.

Dimensions: N tokens of all devices, T of one, d devices, K experts a token, E experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from moe_layer import E, K, Layer, T, dense, gates, make_tokens, make_weights, rounds_by_hand
from tiers import full_unless

from moejax.dispatch import Assignments
from moejax.dispatch import capacity as capacity_strategy

LAYERS = (
    Layer(4, 2, 2, strategy="capacity", capacity=1),
    Layer(2, 2, 2, replica=2, strategy="capacity", capacity=1, folded=False),
    Layer(16, 1, 1, strategy="capacity", capacity=1),
)


@st.composite
def routings(draw):
    """Gates with and without ties, distinct experts a token, some far more popular than others, some tokens nowhere."""
    num_tokens = 16 * T
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity = draw(st.sampled_from([0.0, 2.0, 50.0])) * rng.random(E)
    expert_NK = np.argsort(-(popularity + rng.gumbel(size=(num_tokens, E))), axis=-1)[:, :K].astype(np.int32)
    levels = draw(st.sampled_from([1, 2, 5, 1000]))
    first = rng.integers(1, levels, num_tokens, endpoint=True) / (levels + 1)
    gate_NK = np.stack([first, 1 - first], axis=-1).astype(np.float32)
    nowhere = rng.random(num_tokens) < draw(st.sampled_from([0.0, 0.2]))
    expert_NK[nowhere], gate_NK[nowhere] = E, 0
    return gate_NK, expert_NK


def kept_by_hand(layer, gate_NK, expert_NK):
    """Per replica, stage and expert the highest gates; of equals the earlier sender first, then the earlier token."""
    room = layer.capacity * layer.expert * layer.tensor
    device_NK = np.broadcast_to(np.arange(len(gate_NK))[:, None] // T, gate_NK.shape)
    shape = (layer.replica, layer.expert, layer.pipeline, layer.tensor)
    replica, expert, stage, tensor = np.unravel_index(device_NK, shape)
    group_NK, sender_NK = replica * layer.pipeline + stage, expert * layer.tensor + tensor
    kept_NK = np.zeros(gate_NK.shape, bool)
    for group in range(layer.replica * layer.pipeline):
        for e in range(E):
            mine = zip(*np.nonzero((group_NK == group) & (expert_NK == e)), strict=True)
            ranked = sorted((-gate_NK[n, k], sender_NK[n, k], n, k) for n, k in mine)
            for *_, n, k in ranked[:room]:
                kept_NK[n, k] = True
    return kept_NK


@functools.cache
def highest_gates(layer):
    def device(gate_TK, expert_TK):
        count_E = (expert_TK[..., None] == jnp.arange(E)[None, None]).sum((0, 1), dtype=jnp.int32)
        assignments = Assignments(gate_TK, expert_TK, jnp.zeros_like(expert_TK), count_E)  # no position is asked for
        return capacity_strategy.highest_gates(assignments, layer.capacity * layer.expert * layer.tensor)

    spec = P(layer.mesh.axis_names)
    return jax.jit(jax.shard_map(device, mesh=layer.mesh, in_specs=spec, out_specs=spec))


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@given(routings())
def test_the_highest_gates_among_all_senders_are_kept(layer, routing):
    kept_NK = kept_by_hand(layer, *routing)
    np.testing.assert_array_equal(highest_gates(layer)(*routing), kept_NK)


@pytest.mark.parametrize("layer", full_unless(LAYERS[:1].__contains__, LAYERS, slow=LAYERS[2:].__contains__), ids=str)
@given(st.integers(0, 2**32 - 1))
def test_what_is_dropped_adds_nothing_and_has_no_gradient(layer, seed):
    """Results and every gradient are those of the dense layer without what was dropped by hand.

    One device keeps more assignments to an expert than its buffer has rows: further rounds, as counted by hand.
    """
    rng = np.random.default_rng(seed)
    weights, (x_ND, cotangent_ND) = make_weights(seed), make_tokens(layer.num_tokens, seed)
    score = 2 * rng.random(E) + rng.gumbel(size=(layer.num_tokens, E))
    expert_NK = np.argsort(-score, axis=-1)[:, :K].astype(np.int32)
    expert_NK[:T] = [3, 7]
    gate_NK = np.asarray(gates(weights["router"], x_ND, expert_NK))
    kept_NK = kept_by_hand(layer, gate_NK, expert_NK)

    (y_ND, dropped_d, rounds_d), grads = layer.program(weights, x_ND, expert_NK, cotangent_ND)
    expected = dense(weights, x_ND, expert_NK, cotangent_ND, kept_NK)
    errors = jax.tree.map(relative_error, (y_ND, grads), expected)
    assert max(jax.tree.leaves(errors)) < 1e-5
    np.testing.assert_array_equal(dropped_d, (~kept_NK).reshape(-1, T * K).sum(-1))
    np.testing.assert_array_equal(rounds_d, rounds_by_hand(layer, np.where(kept_NK, expert_NK, E)))
    assert (rounds_d > 1).any()
    assert dropped_d.sum() > 0

    of_nothing = ~kept_NK.any(-1)
    assert of_nothing.any()
    assert not np.asarray(y_ND)[of_nothing].any()
    assert not np.asarray(grads[1])[of_nothing].any()
