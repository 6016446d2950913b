"""Capacity dispatch (GShard, arXiv 2006.16668): one exchange of fixed buffers, what does not fit is dropped.

A sender keeps, for each expert, the assignments of the highest gates. A dropped assignment adds nothing to its token,
whose other gates are not scaled up: the residual stream carries it on.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.dispatch import exchange, slots
from moejax.dispatch.contract import ExpertsFn
from moejax.nn.router import Routing


def run(
    x_TD: jax.Array,
    routing: Routing,
    experts: ExpertsFn,
    weights: Any,
    *,
    num_experts: int,
    capacity: int,
    expert_axes: tuple[str, ...],
) -> tuple[jax.Array, jax.Array]:
    """See `moejax.dispatch.contract.Dispatcher`."""
    with jax.named_scope("dispatch"):
        matching = slots.assign_slots(routing, num_experts, capacity)
        buffer_ECD = slots.fill_buffer(x_TD, matching, routing.expert_TK.shape[1])
        buffer_eCD = exchange.to_experts(buffer_ECD, expert_axes)
    result_eCD = experts(weights, buffer_eCD)
    with jax.named_scope("combine"):
        result_ECD = exchange.to_senders(result_eCD, expert_axes)
        y_TD = slots.read_buffer(result_ECD, matching, routing.gate_TK)
    dropped = (matching.slot_TK == num_experts * capacity).sum(dtype=jnp.float32)
    return y_TD, dropped
