"""The contract that every dispatch strategy fulfils."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from moejax.config import DispatchConfig
from moejax.dispatch.turns import Turn
from moejax.kernels.top_k_routing import Routing


class Experts(NamedTuple):
    """This device's experts, each applied to its own rows: two forms of one function, for dispatchers to choose from.

    `on_buffers(weights, [e, C, D]) -> [e, C, D]` adds up over `tensor` where an expert's width is split over it.
    `on_groups(weights, [R, D], sizes [e]) -> [R, D]` takes rows sorted by expert, int32 sizes of each expert's, and
    zeros behind them; a split width is left to the dispatcher, who knows whose rows they are.
    """

    on_buffers: Callable[[Any, jax.Array], jax.Array]
    on_groups: Callable[[Any, jax.Array, jax.Array], jax.Array]


class DispatchStats(NamedTuple):
    """What a dispatch came to, float32 scalars."""

    dropped: jax.Array  # this device's assignments that reached no expert
    rounds: jax.Array  # exchanges of buffers; the same on all devices that exchange with each other


class Dispatcher(Protocol):
    """Sends each token to its experts, applies them, and brings the results back.

    Runs inside `shard_map`, on one device's arrays. What a strategy does about the number of rows that an expert gets
    (drop, repeat in rounds, ragged buffers) is its own business.
    """

    def __call__(
        self,
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
        """Returns the experts' results [T, D], weighted by gates, in x's dtype; what it came to; and the next turn.

        Args:
            x_TD: this device's tokens.
            routing: the experts and gates of each, and the assignments' positions.
            count_E: int32, this device's assignments to each expert of the model.
            experts: this device's.
            weights: what `experts` takes first; differentiated through.
            capacity: rows that this device sends to one expert at a time; a multiple of `config.chunks`.
            config: which mesh axes the experts are spread over, and how the exchange is done.
            turn: of the dispatch that exchanges before this one.
        """
        ...
