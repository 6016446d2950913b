"""Dropless dispatch: every assignment reaches its expert, in as many rounds of bounded buffers as that takes."""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.dispatch import ragged, slots
from moejax.dispatch.contract import Assignments, DispatchStats, Experts
from moejax.dispatch.exchange import SENDERS, Exchange
from moejax.dispatch.rounds import run_rounds


def run(
    x_TD: jax.Array, assignments: Assignments, experts: Experts, exchange: Exchange
) -> tuple[jax.Array, DispatchStats, Exchange]:
    """See `moejax.dispatch.contract.Dispatcher`. Only tokens that the router could not place count as dropped."""
    if lax.axis_size(SENDERS) == 1:  # nobody to exchange with: no buffers and no rounds either
        return ragged.run(x_TD, assignments, experts, exchange)
    gate_TK, expert_TK, position_TK, count_E = assignments
    with jax.named_scope("dispatch"):
        queue = slots.line_up(expert_TK, position_TK, count_E)
        dropped = (expert_TK == count_E.shape[0]).sum(dtype=jnp.float32)
    y_TD, rounds, exchange = run_rounds(x_TD, gate_TK, queue, experts, exchange)
    return y_TD, DispatchStats(dropped, rounds.astype(jnp.float32)), exchange
