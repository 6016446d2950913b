"""Dropless dispatch: every assignment reaches its expert, in as many rounds of bounded buffers as that takes."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import DispatchConfig
from moejax.dispatch import ragged, slots
from moejax.dispatch.contract import DispatchStats, Experts
from moejax.dispatch.rounds import run_rounds
from moejax.dispatch.turns import Turn
from moejax.kernels.top_k_routing import Routing
from moejax.mesh import EXPERT, TENSOR


def run(
    x_TD: jax.Array,
    routing: Routing,
    count_E: jax.Array,
    experts: Experts,
    weights: Any,
    *,
    capacity: int,
    config: DispatchConfig,
    turn: Turn,
) -> tuple[jax.Array, DispatchStats, Turn]:
    """See `moejax.dispatch.contract.Dispatcher`. Only tokens that the router could not place count as dropped."""
    if lax.axis_size((EXPERT, TENSOR)) == 1:  # nobody to exchange with: no buffers and no rounds either
        return ragged.run(x_TD, routing, count_E, experts, weights, capacity=capacity, config=config, turn=turn)
    with jax.named_scope("dispatch"):
        queue = slots.line_up(routing.expert_TK, routing.position_TK, count_E)
        dropped = (routing.expert_TK == count_E.shape[0]).sum(dtype=jnp.float32)
    y_TD, rounds, turn = run_rounds(
        x_TD, routing.gate_TK, queue, experts, weights, capacity=capacity, config=config, turn=turn
    )
    return y_TD, DispatchStats(dropped, rounds.astype(jnp.float32)), turn
