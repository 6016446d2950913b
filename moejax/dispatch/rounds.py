"""Rounds: assignments reach their experts through buffers of bounded size, round after round until none is left.

Every round has the same buffers, so memory does not depend on the routing, and nothing is dropped: a skewed router
makes a step slower, it cannot make it fail. Devices that exchange with each other agree on the number of rounds, which
is 1 for a balanced router. That first round is ordinary code, with what the backward pass needs of it saved; only
further rounds are a loop, whose backward pass computes their insides again, in a loop of as many rounds.

Dimensions: T tokens, K experts a token, E experts, e this device's experts, C rows of a buffer, D model.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax.dispatch import slots
from moejax.dispatch.contract import Experts
from moejax.dispatch.exchange import Exchange
from moejax.dispatch.slots import Queue
from moejax.kernels.manual import vary, vary_alike, varying
from moejax.mesh import EXPERT, TENSOR

# (round, plan, x [T, D], gates [T, K], weights) -> this round's part of the result [T, D]; the plan is integers
Round = Callable[[jax.Array | int, Any, jax.Array, jax.Array, Any], jax.Array]


def run_rounds(
    x_TD: jax.Array,
    gate_TK: jax.Array,
    queue: Queue,
    experts: Experts,
    weights: Any,
    *,
    capacity: int,
    chunks: int,
    exchange: Exchange,
) -> tuple[jax.Array, jax.Array]:
    """Takes all of the queue to its experts. Returns their weighted results [T, D] and the number of rounds, int32."""
    rounds = lax.pmax((queue.count_E.max() + capacity - 1) // capacity, (EXPERT, TENSOR))
    rounds = jnp.maximum(rounds, 1)
    one_round = partial(_one_round, experts=experts, capacity=capacity, chunks=chunks, exchange=exchange)
    return in_rounds(one_round, rounds, queue, x_TD, gate_TK, weights), rounds


def in_rounds(
    one_round: Round, rounds: jax.Array, plan: Any, x_TD: jax.Array, gate_TK: jax.Array, weights: Any
) -> jax.Array:
    """The sum of `one_round(i, plan, x, gate, weights)` over `rounds` >= 1 rounds, differentiable in the last three.

    Devices that communicate in a round must agree on their number.
    """
    leaves, treedef = jax.tree.flatten((x_TD, gate_TK, weights))
    return _in_rounds(one_round, rounds, plan, *treedef.unflatten(vary_alike(*leaves)))


def _one_round(
    index: jax.Array | int,
    queue: Queue,
    x_TD: jax.Array,
    gate_TK: jax.Array,
    weights: Any,
    *,
    experts: Experts,
    capacity: int,
    chunks: int,
    exchange: Exchange,
) -> jax.Array:
    with jax.named_scope("dispatch"):
        matching = slots.assign_slots(queue, index * capacity, capacity)
        buffer_ECD = slots.fill_buffer(x_TD, matching, gate_TK.shape[1])
    parts = []
    for part_ECD in jnp.split(buffer_ECD, chunks, axis=1):
        with jax.named_scope("dispatch"):
            part_eCD = exchange.to_experts(part_ECD)
        part_eCD = experts.on_buffers(weights, part_eCD)
        with jax.named_scope("combine"):
            parts.append(exchange.to_senders(part_eCD))
    with jax.named_scope("combine"):
        return slots.read_buffer(jnp.concatenate(parts, axis=1), matching, gate_TK)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(
    one_round: Round, rounds: jax.Array, plan: Any, x_TD: jax.Array, gate_TK: jax.Array, weights: Any
) -> jax.Array:
    return _forward(one_round, rounds, plan, x_TD, gate_TK, weights)[0]


def _forward(
    one_round: Round, rounds: jax.Array, plan: Any, x_TD: jax.Array, gate_TK: jax.Array, weights: Any
) -> tuple[jax.Array, Any]:
    args = (x_TD, gate_TK, weights)
    y_TD, first_vjp = jax.vjp(partial(one_round, 0, plan), *args)
    y_TD = _further(rounds, y_TD, lambda index: one_round(index, plan, *args))
    return y_TD, (first_vjp, rounds, plan, args)


def _backward(one_round: Round, residuals: Any, dy_TD: jax.Array) -> tuple[None, None, jax.Array, jax.Array, Any]:
    first_vjp, rounds, plan, args = residuals
    gradients = _further(
        rounds, first_vjp(dy_TD), lambda index: jax.vjp(partial(one_round, index, plan), *args)[1](dy_TD)
    )
    return None, None, *gradients


_in_rounds.defvjp(_forward, _backward)


def _further(rounds: jax.Array, first: Any, of_round: Callable[[jax.Array], Any]) -> Any:
    """`first` plus what `of_round` gives for each round after it."""

    def add(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, total = carry
        return index + 1, jax.tree.map(jnp.add, total, of_round(index))

    start = vary(jnp.ones((), jnp.int32), varying(rounds))
    return lax.while_loop(lambda carry: carry[0] < rounds, add, (start, first))[1]
