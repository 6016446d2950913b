"""The contract that every dispatch strategy fulfils: tokens, their assignments, experts, and an exchange.

Dimensions: T tokens, K experts a token, E experts, e this device's experts, C rows of a buffer, R rows, D model.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from moejax.dispatch.exchange import Exchange


class Assignments(NamedTuple):
    """The router's decisions on this device's tokens: `moejax.kernels.top_k_routing.Routing`, and their counts."""

    gate_TK: jax.Array
    expert_TK: jax.Array  # E: to no expert
    position_TK: jax.Array
    count_E: jax.Array  # int32, assignments to each expert of the model


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("weights",), meta_fields=("apply_to_buffers", "apply_to_groups")
)
@dataclasses.dataclass(frozen=True)
class Experts:
    """This device's experts: their weights, and two forms of one function of them, for strategies to choose from.

    `weights` is differentiated through.
    """

    weights: Any
    apply_to_buffers: Callable[[Any, jax.Array], jax.Array]
    apply_to_groups: Callable[[Any, jax.Array, jax.Array], jax.Array]

    def on_buffers(self, x_eCD: jax.Array) -> jax.Array:
        """Applies each expert to its buffer, [e, C, D] -> [e, C, D], also where its width is split over `tensor`."""
        return self.apply_to_buffers(self.weights, x_eCD)

    def on_groups(self, x_RD: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
        """Applies the experts to rows sorted by expert, with zeros behind them: [R, D] -> [R, D].

        Where a width is split over `tensor` this gives partial sums, for only the strategy knows whose rows they are.
        """
        return self.apply_to_groups(self.weights, x_RD, group_sizes_e)


class DispatchStats(NamedTuple):
    """Figures of one dispatch, float32 scalars."""

    dropped: jax.Array  # this device's assignments that reached no expert
    rounds: jax.Array  # exchanges of buffers; the same on all devices that exchange with each other


class Dispatcher(Protocol):
    """Sends each token to its experts, applies them, and brings the results back.

    Runs inside `shard_map`, on one device's arrays. How a strategy deals with the number of rows that an expert gets
    (drop, repeat in rounds, ragged buffers) is its own business.
    """

    def __call__(
        self, x_TD: jax.Array, assignments: Assignments, experts: Experts, exchange: Exchange
    ) -> tuple[jax.Array, DispatchStats, Exchange]:
        """Returns the results [T, D], weighted by gates, in x's dtype; figures; and the next dispatch's exchange.

        Args:
            x_TD: this device's tokens.
            assignments: the experts of each.
            experts: this device's.
            exchange: how rows travel, and the order of this dispatch after the one before it.
        """
        ...
