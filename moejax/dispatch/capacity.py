"""Capacity dispatch (GShard, arXiv 2006.16668): an expert takes so many assignments and no more.

Which ones is decided by the gate alone: the highest among all senders'. A sender that holds more of them than one
buffer has rows sends them in further rounds. A dropped assignment adds nothing to its token, whose other gates are not
scaled up: the residual stream carries it on.

Dimensions: T tokens, K experts a token, E experts, N = senders * T * K assignments.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import DispatchConfig
from moejax.dispatch import slots
from moejax.dispatch.contract import DispatchStats, Experts
from moejax.dispatch.rounds import run_rounds
from moejax.dispatch.turns import Turn
from moejax.kernels.top_k_routing import Routing
from moejax.mesh import EXPERT, TENSOR

SENDERS = (EXPERT, TENSOR)  # whose tokens meet at an expert, also where its width is split over `tensor`


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
    """See `moejax.dispatch.contract.Dispatcher`. An expert takes `capacity` times the number of senders."""
    with jax.named_scope("dispatch"):
        kept_TK = highest_gates(routing, count_E, capacity * lax.axis_size(SENDERS))
        expert_TK = jnp.where(kept_TK, routing.expert_TK, count_E.shape[0])
        queue = slots.line_up(expert_TK, *slots.positions(expert_TK, count_E.shape[0]))
        dropped = (~kept_TK).sum(dtype=jnp.float32)
    y_TD, rounds, turn = run_rounds(
        x_TD, routing.gate_TK, queue, experts, weights, capacity=capacity, config=config, turn=turn
    )
    return y_TD, DispatchStats(dropped, rounds.astype(jnp.float32)), turn


def highest_gates(routing: Routing, count_E: jax.Array, room: int) -> jax.Array:
    """Which of this device's assignments are among the `room` highest gates of their expert over all senders.

    Every device sorts all senders' assignments, 8 bytes each on the network. Among equals the earlier sender comes
    first, and of one sender's the earlier token.
    """
    num_experts = count_E.shape[0]
    gate_TK = lax.stop_gradient(routing.gate_TK)
    gate_N, expert_N = (lax.all_gather(a.reshape(-1), SENDERS, tiled=True) for a in (gate_TK, routing.expert_TK))
    index_N = jnp.arange(gate_N.shape[0], dtype=jnp.int32)
    _, gate_N, index_N = lax.sort((expert_N, -gate_N, index_N), num_keys=2, is_stable=True)

    count_E = lax.psum(count_E, SENDERS)
    last_E = jnp.clip(jnp.cumsum(count_E) - count_E + room - 1, 0, index_N.shape[0] - 1)  # the last that has room
    full_E = count_E > room
    gate_E, index_E = jnp.where(full_E, -gate_N[last_E], -jnp.inf), index_N[last_E]

    first = lax.axis_index(SENDERS) * gate_TK.size
    mine_TK = (first + jnp.arange(gate_TK.size, dtype=jnp.int32)).reshape(gate_TK.shape)
    expert_TK = jnp.minimum(routing.expert_TK, num_experts - 1)
    above_TK = gate_TK > gate_E[expert_TK]
    first_of_equals_TK = (gate_TK == gate_E[expert_TK]) & (mine_TK <= index_E[expert_TK])
    return (routing.expert_TK < num_experts) & (above_TK | first_of_equals_TK)
