"""Slots: where each assignment sits in its expert's buffer, and moving rows in and out of buffers.

Dimensions: T tokens, K experts a token, E experts, C rows of a buffer, D model. An assignment is a pair (token, choice)
with index `token * K + choice`; a slot is a pair (expert, row) with index `expert * C + row`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.kernels.top_k_routing import reference
from moejax.remat import NETWORK, named


class Queue(NamedTuple):
    """This device's assignments in line for their experts, int32: by expert, and in each line by position.

    `expert_TK` is E, and `order_N` ends with, what stands in no line.
    """

    expert_TK: jax.Array
    position_TK: jax.Array
    count_E: jax.Array
    start_E: jax.Array  # where each expert's line starts in `order_N`
    order_N: jax.Array  # assignments, N = T * K


class Slots(NamedTuple):
    """The two directions of one partial matching, int32. E * C (as many as slots) is "not here", T * K "empty"."""

    slot_TK: jax.Array
    assignment_EC: jax.Array


def positions(expert_TK: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array]:
    """Each assignment's position in its expert's line, token by token, and the lines' lengths; E stands in no line."""
    chosen_TE = (expert_TK[..., None] == jnp.arange(num_experts, dtype=jnp.int32)[None, None]).any(1)
    return reference.positions(chosen_TE, expert_TK), chosen_TE.sum(0, dtype=jnp.int32)


def in_line(queue: Queue) -> Slots:
    """Every assignment at its place in `order_N`: one buffer [N] for all experts."""
    num_assignments = queue.order_N.shape[0]
    start_TK = queue.start_E.at[queue.expert_TK].get(mode="fill", fill_value=num_assignments)
    return Slots(jnp.minimum(start_TK + queue.position_TK, num_assignments), queue.order_N)


def line_up(expert_TK: jax.Array, position_TK: jax.Array, count_E: jax.Array) -> Queue:
    """The queue of assignments with these positions, which count from 0 without gaps in each expert's line."""
    num_assignments = expert_TK.size
    start_E = jnp.cumsum(count_E) - count_E
    place_TK = start_E.at[expert_TK].get(mode="fill", fill_value=num_assignments) + position_TK
    index_N = jnp.arange(num_assignments, dtype=jnp.int32)
    order_N = jnp.full_like(index_N, num_assignments)
    order_N = order_N.at[place_TK.reshape(-1)].set(index_N, mode="drop", unique_indices=True)
    return Queue(expert_TK, position_TK, count_E, start_E, order_N)


def assign_slots(queue: Queue, first: jax.Array | int, capacity: int) -> Slots:
    """Gives each expert's `capacity` rows to the assignments from position `first` on."""
    num_experts, num_assignments = queue.count_E.shape[0], queue.order_N.shape[0]
    row_TK = queue.position_TK - first
    here_TK = (queue.expert_TK < num_experts) & (row_TK >= 0) & (row_TK < capacity)
    slot_TK = jnp.where(here_TK, queue.expert_TK * capacity + row_TK, num_experts * capacity)

    position_C = first + jnp.arange(capacity, dtype=jnp.int32)
    place_EC = jnp.minimum(queue.start_E[:, None] + position_C[None], num_assignments - 1)
    taken_EC = position_C[None] < queue.count_E[:, None]
    return Slots(slot_TK, jnp.where(taken_EC, queue.order_N[place_EC], num_assignments))


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
    rows = named(rows, NETWORK)  # kept in place of the buffer, which has more of them
    rows_TKD = rows.reshape(*gate_TK.shape, -1)
    return jnp.einsum("tkd,tk->td", rows_TKD, gate_TK, preferred_element_type=jnp.float32).astype(y_ECD.dtype)
