"""Capacity dispatch (GShard, arXiv 2006.16668): an expert takes so many assignments and no more.

Which ones is decided by the gate alone: the highest among all senders'. A sender that holds more of them than one
buffer has rows sends them in further rounds. A dropped assignment adds nothing to its token, whose other gates are not
scaled up: the residual stream carries it on.

Dimensions: T tokens, K experts a token, E experts, N = senders * T * K assignments.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.dispatch import slots
from moejax.dispatch.contract import Assignments, DispatchStats, Experts
from moejax.dispatch.exchange import SENDERS, Exchange
from moejax.dispatch.rounds import run_rounds


def run(
    x_TD: jax.Array, assignments: Assignments, experts: Experts, exchange: Exchange
) -> tuple[jax.Array, DispatchStats, Exchange]:
    """See `moejax.dispatch.contract.Dispatcher`. An expert takes `capacity` times the number of senders."""
    num_experts = assignments.count_E.shape[0]
    with jax.named_scope("dispatch"):
        kept_TK = highest_gates(assignments, exchange.capacity * lax.axis_size(SENDERS))
        expert_TK = jnp.where(kept_TK, assignments.expert_TK, num_experts)
        queue = slots.line_up(expert_TK, *slots.positions(expert_TK, num_experts))
        dropped = (~kept_TK).sum(dtype=jnp.float32)
    y_TD, rounds, exchange = run_rounds(x_TD, assignments.gate_TK, queue, experts, exchange)
    return y_TD, DispatchStats(dropped, rounds.astype(jnp.float32)), exchange


def highest_gates(assignments: Assignments, room: int) -> jax.Array:
    """Returns which of this device's assignments are among the `room` highest gates of their expert over all senders.

    Every device sorts all senders' assignments, 8 bytes each on the network. Among equals the earlier sender comes
    first, and of one sender's the earlier token.
    """
    num_experts = assignments.count_E.shape[0]
    gate_TK = lax.stop_gradient(assignments.gate_TK)
    gate_N, expert_N = (lax.all_gather(a.reshape(-1), SENDERS, tiled=True) for a in (gate_TK, assignments.expert_TK))
    index_N = jnp.arange(gate_N.shape[0], dtype=jnp.int32)
    _, gate_N, index_N = lax.sort((expert_N, -gate_N, index_N), num_keys=2, is_stable=True)

    count_E = lax.psum(assignments.count_E, SENDERS)
    last_E = jnp.clip(jnp.cumsum(count_E) - count_E + room - 1, 0, index_N.shape[0] - 1)  # the last that has room
    full_E = count_E > room
    gate_E, index_E = jnp.where(full_E, -gate_N[last_E], -jnp.inf), index_N[last_E]

    first = lax.axis_index(SENDERS) * gate_TK.size
    mine_TK = (first + jnp.arange(gate_TK.size, dtype=jnp.int32)).reshape(gate_TK.shape)
    expert_TK = jnp.minimum(assignments.expert_TK, num_experts - 1)
    above_TK = gate_TK > gate_E[expert_TK]
    first_of_equals_TK = (gate_TK == gate_E[expert_TK]) & (mine_TK <= index_E[expert_TK])
    return (assignments.expert_TK < num_experts) & (above_TK | first_of_equals_TK)
