"""The contract that every dispatch strategy fulfils."""

from collections.abc import Callable
from typing import Any, Protocol

import jax

from moejax.nn.router import Routing

ExpertsFn = Callable[[Any, jax.Array], jax.Array]  # (weights, [e, C, D]) -> [e, C, D], row by row


class Dispatcher(Protocol):
    """Sends each token to its experts, applies them, and brings the results back.

    Runs inside `shard_map`, on one device's arrays. The experts work row by row on buffers [e, C, D] of this device's
    experts; what a strategy does about the number of rows (drop, repeat in rounds, ragged buffers) is its own business.
    """

    def __call__(
        self,
        x_TD: jax.Array,
        routing: Routing,
        experts: ExpertsFn,
        weights: Any,
        *,
        num_experts: int,
        capacity: int,
        expert_axes: tuple[str, ...],
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the gate-weighted sum of the experts' results [T, D] and the number of assignments dropped.

        Args:
            x_TD: this device's tokens.
            routing: the experts and gates of each.
            experts: applies this device's experts to a buffer [e, C, D].
            weights: what `experts` takes first; differentiated through.
            num_experts: E, over all devices.
            capacity: rows that this device sends to one expert at a time.
            expert_axes: the mesh axes the experts are spread over, major first.
        """
        ...
