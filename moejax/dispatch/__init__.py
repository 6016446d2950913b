"""How tokens reach their experts: one strategy a file, all behind `Dispatcher`."""

import jax

from moejax.dispatch import capacity, dropless, ragged
from moejax.dispatch.contract import Assignments, Dispatcher, DispatchStats, Experts
from moejax.dispatch.exchange import Exchange

STRATEGIES: dict[str, Dispatcher] = {"capacity": capacity.run, "dropless": dropless.run, "ragged": ragged.run}


def dispatch(
    x_TD: jax.Array, assignments: Assignments, experts: Experts, exchange: Exchange
) -> tuple[jax.Array, DispatchStats, Exchange]:
    """Runs the strategy that the exchange names; see `Dispatcher`."""
    return STRATEGIES[exchange.strategy](x_TD, assignments, experts, exchange)


__all__ = ["STRATEGIES", "Assignments", "DispatchStats", "Dispatcher", "Exchange", "Experts", "dispatch"]
