"""Dispatch and combine lose no token but those beyond capacity, which are those of the lowest gates.

Dimensions: T tokens of one device, K experts a token, E experts, C rows of a buffer, D model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from moejax.dispatch import capacity as capacity_strategy
from moejax.dispatch import slots
from moejax.mesh import MeshConfig, build_mesh
from moejax.nn.router import Routing

T, K, E, D = 12, 2, 16, 4
ALL_AXES = ("expert", "pipeline", "tensor")


@st.composite
def routings(draw, num_tokens=T):
    """Distinct experts a token, some of them far more popular than others; gates with ties, summing to 1 a token."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity = draw(st.sampled_from([0.0, 2.0, 50.0])) * rng.random(E)  # 50: nearly every token picks the same two
    score = popularity + rng.gumbel(size=(num_tokens, E))
    expert = np.argsort(-score, axis=-1)[:, :K].astype(np.int32)
    levels = draw(st.sampled_from([2, 5, 1000]))
    first = rng.integers(1, levels, num_tokens, endpoint=True) / (levels + 1)
    return np.stack([first, 1 - first], axis=-1).astype(np.float32), expert


def kept_by_hand(gate_TK, expert_TK, capacity):
    """Which assignments are kept: per expert the `capacity` highest gates, the earlier token first among equals."""
    kept = np.zeros(gate_TK.shape, bool)
    for e in range(E):
        mine = [(-gate_TK[t, k], t, k) for t, k in zip(*np.nonzero(expert_TK == e), strict=True)]
        for _, t, k in sorted(mine)[:capacity]:
            kept[t, k] = True
    return kept


@functools.partial(jax.jit, static_argnums=2)
def assign(gate_TK, expert_TK, capacity):
    return slots.assign_slots(Routing(gate_TK, expert_TK), E, capacity)


@given(routings(), st.integers(1, T))
def test_every_kept_assignment_has_one_slot_of_its_expert(routing, capacity):
    gate_TK, expert_TK = routing
    slot_TK, assignment_EC = map(np.asarray, assign(gate_TK, expert_TK, capacity))
    kept_TK = slot_TK < E * capacity
    np.testing.assert_array_equal(kept_TK, kept_by_hand(gate_TK, expert_TK, capacity))
    np.testing.assert_array_equal((slot_TK // capacity)[kept_TK], expert_TK[kept_TK])
    assert np.unique(slot_TK[kept_TK]).size == kept_TK.sum()
    # The two directions are one matching, and every other slot is empty.
    np.testing.assert_array_equal(assignment_EC.reshape(-1)[slot_TK[kept_TK]], np.flatnonzero(kept_TK))
    assert (assignment_EC < T * K).sum() == kept_TK.sum()
    assert (slot_TK[~kept_TK] == E * capacity).all()
    assert (assignment_EC[assignment_EC >= T * K] == T * K).all()


@functools.cache
def round_trip(expert_axes, capacity):
    """Dispatch and combine over 16 devices with experts that return what they get."""
    mesh = build_mesh(MeshConfig(4, 2, 2))

    def device(x_TD, gate_TK, expert_TK):
        y_TD, dropped = capacity_strategy.run(
            x_TD, Routing(gate_TK, expert_TK), lambda _, x_eCD: x_eCD, None,
            num_experts=E, capacity=capacity, expert_axes=expert_axes,
        )  # fmt: skip
        return y_TD, dropped[None]

    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=P(ALL_AXES), out_specs=P(ALL_AXES)))


@pytest.mark.parametrize("expert_axes", [("expert",), ("expert", "tensor")], ids="x".join)
@given(routings(16 * T), st.sampled_from([1, 2, 5, T]))
def test_identity_experts_return_each_token_times_its_kept_gates(expert_axes, routing, capacity):
    gate_TK, expert_TK = routing
    x_TD = np.random.default_rng(0).standard_normal((16 * T, D), np.float32)
    y_TD, dropped = round_trip(expert_axes, capacity)(x_TD, gate_TK, expert_TK)
    senders = zip(np.split(gate_TK, 16), np.split(expert_TK, 16), strict=True)
    kept_TK = np.concatenate([kept_by_hand(gate, expert, capacity) for gate, expert in senders])
    np.testing.assert_allclose(y_TD, x_TD * (gate_TK * kept_TK).sum(-1, keepdims=True), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(dropped, (~kept_TK).reshape(16, -1).sum(-1))
    if capacity == T:
        np.testing.assert_allclose(y_TD, x_TD, rtol=1e-6, atol=1e-6)


@given(routings(), st.sampled_from([1, 3, T]))
def test_row_gradients_are_those_of_plain_indexing(routing, capacity):
    """`take_rows` gathers in its backward pass as well; autodiff of indexing would scatter."""
    matching = assign(*routing, capacity)
    gate_TK = jnp.asarray(routing[0])
    rng = np.random.default_rng(1)
    x_TD = jnp.asarray(rng.standard_normal((T, D), np.float32))
    y_ECD = jnp.asarray(rng.standard_normal((E, capacity, D), np.float32))

    def fill_plainly(x_TD):
        return x_TD.at[matching.assignment_EC // K].get(mode="fill", fill_value=0)

    def read_plainly(y_ECD, gate_TK):
        rows_TKD = y_ECD.reshape(-1, D).at[matching.slot_TK].get(mode="fill", fill_value=0)
        return (rows_TKD * gate_TK[..., None]).sum(1)

    actual, pull = jax.vjp(lambda x: slots.fill_buffer(x, matching, K), x_TD)
    expected, pull_plainly = jax.vjp(fill_plainly, x_TD)
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_allclose(pull(y_ECD)[0], pull_plainly(y_ECD)[0], rtol=1e-6, atol=1e-6)

    actual, pull = jax.vjp(lambda y, gate: slots.read_buffer(y, matching, gate), y_ECD, gate_TK)
    expected, pull_plainly = jax.vjp(read_plainly, y_ECD, gate_TK)
    np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)
    for got, wanted in zip(pull(x_TD), pull_plainly(x_TD), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_rows_has_no_scatter():
    index_M, inverse_NJ = jnp.arange(4), jnp.arange(4)[:, None]
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: slots.take_rows(x, index_M, inverse_NJ).sum()))(jnp.ones((4, 2)))
    assert "gather" in str(jaxpr)
    assert "scatter" not in str(jaxpr)
