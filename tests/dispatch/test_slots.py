"""Slots: every assignment has one place, in one round; rows come and go as plain indexing would have them.

Dimensions: T tokens, K experts a token, E experts, C rows of a buffer, D model.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejax.dispatch import slots

T, K, E, D = 12, 2, 6, 4
CAPACITIES = (1, 2, 5, T)


@st.composite
def choices(draw):
    """Distinct experts a token, [T, K]; in some draws nearly all the same ones, or tokens that go nowhere: E."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    popularity = draw(st.sampled_from([0.0, 2.0, 50.0])) * rng.random(E)
    expert_TK = np.argsort(-(popularity + rng.gumbel(size=(T, E))), axis=-1)[:, :K].astype(np.int32)
    nowhere = draw(st.sampled_from([0.0, 0.3, 1.0]))
    expert_TK[rng.random(T) < nowhere] = E
    return expert_TK


def lined_up(expert_TK):
    """The queue; what stands nowhere has some position, which must not matter."""
    position_TK, count_E = slots.positions(expert_TK, E)
    return slots.line_up(expert_TK, jnp.where(expert_TK < E, position_TK, 1), count_E)


@functools.partial(jax.jit, static_argnums=2)
def assign(expert_TK, first, capacity):
    return slots.assign_slots(lined_up(expert_TK), first, capacity)


@given(choices())
def test_positions_count_an_experts_earlier_assignments(expert_TK):
    position_TK, count_E = jax.jit(slots.positions, static_argnums=1)(expert_TK, E)
    flat = expert_TK.reshape(-1)
    for i, expert in enumerate(flat):
        if expert < E:
            assert position_TK.reshape(-1)[i] == (flat[:i] == expert).sum()
    np.testing.assert_array_equal(count_E, np.bincount(flat, minlength=E + 1)[:E])


@given(choices())
def test_the_queue_lists_each_line_by_position(expert_TK):
    queue = jax.jit(lined_up)(expert_TK)
    flat = expert_TK.reshape(-1)
    in_line = np.argsort(flat, kind="stable")[: (flat < E).sum()]
    np.testing.assert_array_equal(queue.order_N, np.pad(in_line, (0, T * K - in_line.size), constant_values=T * K))
    np.testing.assert_array_equal(queue.start_E, np.searchsorted(flat[in_line], np.arange(E)))


@jax.jit
def one_buffer(expert_TK):
    queue = lined_up(expert_TK)
    return queue, slots.in_line(queue)


@given(choices())
def test_one_buffer_in_line_holds_all_assignments(expert_TK):
    queue, matching = one_buffer(expert_TK)
    slot_TK, assignment_N = map(np.asarray, matching)
    somewhere_TK = expert_TK < E
    assert (slot_TK[~somewhere_TK] == T * K).all()
    np.testing.assert_array_equal(assignment_N[slot_TK[somewhere_TK]], np.flatnonzero(somewhere_TK))
    assert (assignment_N < T * K).sum() == somewhere_TK.sum() == queue.count_E.sum()


@given(choices(), st.sampled_from(CAPACITIES))
def test_every_assignment_has_one_slot_of_its_expert_in_one_round(expert_TK, capacity):
    seen_TK = np.zeros((T, K), int)
    for first in range(0, T, capacity):
        slot_TK, assignment_EC = map(np.asarray, assign(expert_TK, first, capacity))
        here_TK = slot_TK < E * capacity
        seen_TK += here_TK
        np.testing.assert_array_equal((slot_TK // capacity)[here_TK], expert_TK[here_TK])
        # The two directions are one matching, and every other slot is empty.
        np.testing.assert_array_equal(assignment_EC.reshape(-1)[slot_TK[here_TK]], np.flatnonzero(here_TK))
        assert (assignment_EC < T * K).sum() == here_TK.sum()
        assert (slot_TK[~here_TK] == E * capacity).all()
        assert (assignment_EC[assignment_EC >= T * K] == T * K).all()
        # Rows are filled from the first on.
        assert (np.diff((assignment_EC < T * K).astype(int), axis=1) <= 0).all()
    np.testing.assert_array_equal(seen_TK, expert_TK < E)


def rows_and_gradients(fill, read, x_TD, y_ECD, gate_TK, dy_TD):
    """A buffer filled and another one read, each with its gradients."""
    filled, pull_filled = jax.vjp(fill, x_TD)
    read, pull_read = jax.vjp(read, y_ECD, gate_TK)
    return filled, read, pull_filled(y_ECD), pull_read(dy_TD)


@jax.jit  # compiled once per capacity
def by_slots_and_by_indexing(matching, *arrays):
    def fill_plainly(x_TD):
        return x_TD.at[matching.assignment_EC // K].get(mode="fill", fill_value=0)

    def read_plainly(y_ECD, gate_TK):
        rows_TKD = y_ECD.reshape(-1, D).at[matching.slot_TK].get(mode="fill", fill_value=0)
        return (rows_TKD * gate_TK[..., None]).sum(1)

    fill, read = lambda x: slots.fill_buffer(x, matching, K), lambda y, gate: slots.read_buffer(y, matching, gate)
    return rows_and_gradients(fill, read, *arrays), rows_and_gradients(fill_plainly, read_plainly, *arrays)


@given(choices(), st.sampled_from(CAPACITIES), st.integers(0, 2))
def test_rows_and_their_gradients_are_those_of_plain_indexing(expert_TK, capacity, round_index):
    """`take_rows` gathers in its backward pass as well; autodiff of indexing would scatter."""
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(shape, np.float32) for shape in ((T, D), (E, capacity, D), (T, K), (T, D))]
    actual, expected = by_slots_and_by_indexing(assign(expert_TK, round_index * capacity, capacity), *arrays)
    np.testing.assert_array_equal(actual[0], expected[0])
    for got, wanted in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gradient_of_rows_has_no_scatter(dtype):
    matching = assign(np.tile(np.arange(K, dtype=np.int32), (T, 1)), 0, T)

    def there_and_back(x_TD, gate_TK):
        return slots.read_buffer(slots.fill_buffer(x_TD, matching, K), matching, gate_TK).sum()

    args = jnp.ones((T, D), dtype), jnp.ones((T, K))
    jaxpr = str(jax.make_jaxpr(jax.grad(there_and_back, argnums=(0, 1)))(*args))
    assert "gather" in jaxpr
    assert "scatter" not in jaxpr
