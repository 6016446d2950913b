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

from moejax.config import DispatchConfig
from moejax.dispatch import slots
from moejax.dispatch.contract import Experts
from moejax.dispatch.exchange import Exchange
from moejax.dispatch.slots import Queue
from moejax.dispatch.turns import Turn, after, moment
from moejax.kernels.manual import vary, vary_alike, varying
from moejax.mesh import EXPERT, TENSOR

# (round, plan, x [T, D], gates [T, K], weights) -> this round's part of the result [T, D]; the plan is integers, its
# own turn among them, and what is returned beside the result is the next dispatch's
Round = Callable[[jax.Array | int, Any, jax.Array, jax.Array, Any], tuple[jax.Array, Turn]]


def run_rounds(
    x_TD: jax.Array,
    gate_TK: jax.Array,
    queue: Queue,
    experts: Experts,
    weights: Any,
    *,
    capacity: int,
    config: DispatchConfig,
    turn: Turn,
) -> tuple[jax.Array, jax.Array, Turn]:
    """Takes all of the queue to its experts. Returns their weighted results [T, D], the rounds, int32, and the turn."""
    with jax.named_scope("dispatch"):
        rounds = lax.pmax((queue.count_E.max() + capacity - 1) // capacity, (EXPERT, TENSOR))
        rounds = jnp.maximum(rounds, 1)
    exchange = Exchange.from_config(config)
    one_round = partial(_one_round, experts=experts, capacity=capacity, chunks=config.chunks, exchange=exchange)
    y_TD, turn = in_rounds(one_round, rounds, (queue, turn), x_TD, gate_TK, weights)
    return y_TD, rounds, turn


def in_rounds(
    one_round: Round, rounds: jax.Array, plan: Any, x_TD: jax.Array, gate_TK: jax.Array, weights: Any
) -> tuple[jax.Array, Turn]:
    """The sum of `one_round(i, plan, x, gate, weights)` over `rounds` >= 1 rounds, differentiable in the last three.
    The turn is the first round's.

    Devices that communicate in a round must agree on their number.
    """
    leaves, treedef = jax.tree.flatten((x_TD, gate_TK, weights))
    with jax.named_scope("gather"):  # the sum of the weights' gradients
        varying = vary_alike(*leaves)
    return _in_rounds(one_round, rounds, plan, *jax.tree.unflatten(treedef, varying))


def _one_round(
    index: jax.Array | int,
    plan: tuple[Queue, Turn],
    x_TD: jax.Array,
    gate_TK: jax.Array,
    weights: Any,
    *,
    experts: Experts,
    capacity: int,
    chunks: int,
    exchange: Exchange,
) -> tuple[jax.Array, Turn]:
    queue, turn = plan
    with jax.named_scope("dispatch"):
        matching = slots.assign_slots(queue, index * capacity, capacity)
        buffer_ECD = slots.fill_buffer(x_TD, matching, gate_TK.shape[1])
    sent, arrived = moment(buffer_ECD), turn.arrived
    parts = []
    for part_ECD in jnp.split(buffer_ECD, chunks, axis=1):
        with jax.named_scope("dispatch"):
            part_eCD = exchange.to_experts(after(part_ECD, arrived))
            arrived = moment(part_eCD)
        part_eCD = experts.on_buffers(weights, part_eCD)
        with jax.named_scope("combine"):
            parts.append(exchange.to_senders(part_eCD))
    with jax.named_scope("combine"):
        return slots.read_buffer(jnp.concatenate(parts, axis=1), matching, gate_TK), Turn(sent, arrived)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_rounds(
    one_round: Round, rounds: jax.Array, plan: Any, x_TD: jax.Array, gate_TK: jax.Array, weights: Any
) -> tuple[jax.Array, Turn]:
    return _forward(one_round, rounds, plan, x_TD, gate_TK, weights)[0]


def _forward(
    one_round: Round, rounds: jax.Array, plan: Any, x_TD: jax.Array, gate_TK: jax.Array, weights: Any
) -> tuple[tuple[jax.Array, Turn], Any]:
    args = (x_TD, gate_TK, weights)
    y_TD, first_vjp, turn = jax.vjp(partial(one_round, 0, plan), *args, has_aux=True)
    y_TD = _further(rounds, y_TD, lambda index: one_round(index, plan, *args)[0])
    return (y_TD, turn), (first_vjp, rounds, plan, args)


def _backward(
    one_round: Round, residuals: Any, dy: tuple[jax.Array, Any]
) -> tuple[None, None, jax.Array, jax.Array, Any]:
    dy_TD, _ = dy
    first_vjp, rounds, plan, args = residuals

    def of_round(index: jax.Array) -> Any:
        return jax.vjp(partial(one_round, index, plan), *args, has_aux=True)[1](dy_TD)

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
