"""Slots: where each assignment sits in its expert's buffer, and moving rows in and out of buffers.

Dimensions: T tokens, K experts a token, E experts, C rows of a buffer, D model. An assignment is a pair (token, choice)
with index `token * K + choice`; a slot is a pair (expert, row) with index `expert * C + row`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.nn.router import Routing


class Slots(NamedTuple):
    """The two directions of one partial matching, int32. E * C stands for "dropped", T * K for "empty"."""

    slot_TK: jax.Array
    assignment_EC: jax.Array


def assign_slots(routing: Routing, num_experts: int, capacity: int) -> Slots:
    """Gives each expert's rows to its assignments of the highest gate; ties go to the earlier token."""
    gate, expert = routing.gate_TK.reshape(-1), routing.expert_TK.reshape(-1)
    num_assignments = expert.shape[0]
    index = jnp.arange(num_assignments, dtype=jnp.int32)
    expert_sorted, _, order = lax.sort((expert, -lax.stop_gradient(gate), index), num_keys=2, is_stable=True)
    count_E = (expert[:, None] == jnp.arange(num_experts, dtype=expert.dtype)[None]).sum(0, dtype=jnp.int32)
    end_E = jnp.cumsum(count_E)
    start_E = end_E - count_E

    row_sorted = index - start_E[expert_sorted]
    slot_sorted = jnp.where(row_sorted < capacity, expert_sorted * capacity + row_sorted, num_experts * capacity)
    _, slot = lax.sort((order, slot_sorted), num_keys=1)  # a sort inverts a permutation without a scatter

    position_EC = start_E[:, None] + jnp.arange(capacity, dtype=jnp.int32)[None]
    taken_EC = position_EC < end_E[:, None]
    assignment_EC = jnp.where(taken_EC, order[jnp.minimum(position_EC, num_assignments - 1)], num_assignments)
    return Slots(slot.reshape(routing.expert_TK.shape), assignment_EC)


def _rows(x_ND: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x at `index` [...], zeros where the index is N."""
    return x_ND.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def take_rows(x_ND: jax.Array, index_M: jax.Array, inverse_NJ: jax.Array) -> jax.Array:
    """`x[index]`, zeros where index is N, with a gradient that gathers too: a scatter-add is slow and unordered.

    `inverse_NJ` lists, for each row of x, the up to J places where `index_M` holds it, and M for "no place".
    """
    del inverse_NJ
    return _rows(x_ND, index_M)


def _take_rows_forward(x_ND: jax.Array, index_M: jax.Array, inverse_NJ: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _rows(x_ND, index_M), inverse_NJ


def _take_rows_backward(inverse_NJ: jax.Array, dy_MD: jax.Array) -> tuple[jax.Array, None, None]:
    return _rows(dy_MD, inverse_NJ).sum(1), None, None


take_rows.defvjp(_take_rows_forward, _take_rows_backward)


def fill_buffer(x_TD: jax.Array, slots: Slots, experts_per_token: int) -> jax.Array:
    """Copies each kept assignment's token into its slot: [E, C, D], zeros in empty slots."""
    token_EC = slots.assignment_EC // experts_per_token  # T * K // K = T: empty
    buffer = take_rows(x_TD, token_EC.reshape(-1), slots.slot_TK)
    return buffer.reshape(*token_EC.shape, x_TD.shape[-1])


def read_buffer(y_ECD: jax.Array, slots: Slots, gate_TK: jax.Array) -> jax.Array:
    """Sums each token's rows, weighted by its gates in float32: [T, D] in y's dtype. What was dropped adds nothing."""
    rows = take_rows(y_ECD.reshape(-1, y_ECD.shape[-1]), slots.slot_TK.reshape(-1), slots.assignment_EC.reshape(-1, 1))
    rows_TKD = rows.reshape(*gate_TK.shape, -1)
    return jnp.einsum("tkd,tk->td", rows_TKD, gate_TK, preferred_element_type=jnp.float32).astype(y_ECD.dtype)
