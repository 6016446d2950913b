"""Rounds: assignments reach their experts through buffers of bounded size, round after round until none is left.

Every round has the same buffers, so memory does not depend on the routing, and nothing is dropped: a skewed router
makes a step slower, it cannot make it fail. Devices that exchange with each other agree on the number of rounds, which
is 1 for a balanced router. That first round is ordinary code, with what the backward pass needs of it saved; only
further rounds are a loop, whose backward pass computes their insides again, in a loop of as many rounds.

Dimensions: T tokens, K experts a token, E experts, e this device's experts, C rows of a buffer, D model.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax.dispatch import slots
from moejax.dispatch.contract import Experts
from moejax.dispatch.exchange import SENDERS, Exchange
from moejax.dispatch.ordering import Order, token_of, wait_for
from moejax.dispatch.slots import Queue
from moejax.kernels.manual import vary, vary_alike, varying

# (round, given, x [T, D], gates [T, K], experts) -> this round's part of the result [T, D], and the next dispatch's
# exchange; all that is given has no gradient: it is integers, the queue and the exchange's tokens among them
Round = Callable[[jax.Array | int, Any, jax.Array, jax.Array, Experts], tuple[jax.Array, Exchange]]


def run_rounds(
    x_TD: jax.Array, gate_TK: jax.Array, queue: Queue, experts: Experts, exchange: Exchange
) -> tuple[jax.Array, jax.Array, Exchange]:
    """Takes all of the queue to its experts, in buffers of `exchange.capacity` rows for each expert.

    Returns the weighted results [T, D], the number of rounds, int32, and the next dispatch's exchange.
    """
    capacity = exchange.capacity
    with jax.named_scope("dispatch"):
        rounds = jnp.maximum(lax.pmax((queue.count_E.max() + capacity - 1) // capacity, SENDERS), 1)
    y_TD, exchange = in_rounds(_one_round, rounds, (queue, exchange), x_TD, gate_TK, experts)
    return y_TD, rounds, exchange


def in_rounds(
    one_round: Round, rounds: jax.Array, given: Any, x_TD: jax.Array, gate_TK: jax.Array, experts: Experts
) -> tuple[jax.Array, Exchange]:
    """Sums `one_round(i, given, x, gate, experts)` over `rounds` >= 1 rounds, differentiable in the last three.

    Devices that communicate in a round must agree on their number. The exchange that comes back is the first round's.
    """
    leaves, treedef = jax.tree.flatten((x_TD, gate_TK, experts))
    with jax.named_scope("gather"):  # the sum of the weights' gradients
        varying = vary_alike(*leaves)
    return _in_rounds(one_round, rounds, given, *jax.tree.unflatten(treedef, varying))


def _one_round(
    index: jax.Array | int, given: tuple[Queue, Exchange], x_TD: jax.Array, gate_TK: jax.Array, experts: Experts
) -> tuple[jax.Array, Exchange]:
    queue, exchange = given
    with jax.named_scope("dispatch"):
        matching = slots.assign_slots(queue, index * exchange.capacity, exchange.capacity)
        buffer_ECD = slots.fill_buffer(x_TD, matching, gate_TK.shape[1])
    filled, arrived = token_of(buffer_ECD), exchange.order.arrived
    parts = []
    for part_ECD in jnp.split(buffer_ECD, exchange.chunks, axis=1):
        with jax.named_scope("dispatch"):
            part_eCD = exchange.to_experts(wait_for(part_ECD, arrived))
            arrived = token_of(part_eCD)
        part_eCD = experts.on_buffers(part_eCD)
        with jax.named_scope("combine"):
            parts.append(exchange.to_senders(part_eCD))
    with jax.named_scope("combine"):
        y_TD = slots.read_buffer(jnp.concatenate(parts, axis=1), matching, gate_TK)
    return y_TD, dataclasses.replace(exchange, order=Order(filled, arrived))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(
    one_round: Round, rounds: jax.Array, given: Any, x_TD: jax.Array, gate_TK: jax.Array, experts: Experts
) -> tuple[jax.Array, Exchange]:
    return _forward(one_round, rounds, given, x_TD, gate_TK, experts)[0]


def _forward(
    one_round: Round, rounds: jax.Array, given: Any, x_TD: jax.Array, gate_TK: jax.Array, experts: Experts
) -> tuple[tuple[jax.Array, Exchange], Any]:
    args = (x_TD, gate_TK, experts)
    y_TD, first_vjp, exchange = jax.vjp(partial(one_round, 0, given), *args, has_aux=True)
    y_TD = _further(rounds, y_TD, lambda index: one_round(index, given, *args)[0])
    return (y_TD, exchange), (first_vjp, rounds, given, args)


def _backward(
    one_round: Round, residuals: Any, dy: tuple[jax.Array, Any]
) -> tuple[None, None, jax.Array, jax.Array, Experts]:
    dy_TD, _ = dy
    first_vjp, rounds, given, args = residuals

    def of_round(index: jax.Array) -> Any:
        return jax.vjp(partial(one_round, index, given), *args, has_aux=True)[1](dy_TD)

    gradients = _further(rounds, first_vjp(dy_TD), of_round)
    return None, None, *gradients


_in_rounds.defvjp(_forward, _backward)


def _further(rounds: jax.Array, first: Any, of_round: Callable[[jax.Array], Any]) -> Any:
    """`first` plus what `of_round` gives for each round after it."""

    def add(carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        index, total = carry
        return index + 1, jax.tree.map(jnp.add, total, of_round(index))

    start = vary(jnp.ones((), jnp.int32), varying(rounds))
    return lax.while_loop(lambda carry: carry[0] < rounds, add, (start, first))[1]
