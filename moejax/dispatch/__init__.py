"""How tokens reach their experts: one strategy a file, all behind `Dispatcher`."""

from moejax.config import DispatchConfig
from moejax.dispatch import capacity, dropless, ragged
from moejax.dispatch.contract import Dispatcher, DispatchStats, Experts
from moejax.dispatch.turns import Turn, after, first_turn

STRATEGIES: dict[str, Dispatcher] = {"capacity": capacity.run, "dropless": dropless.run, "ragged": ragged.run}


def get_dispatcher(config: DispatchConfig) -> Dispatcher:
    """The strategy that `config.strategy` names."""
    return STRATEGIES[config.strategy]


__all__ = ["STRATEGIES", "DispatchStats", "Dispatcher", "Experts", "Turn", "after", "first_turn", "get_dispatcher"]
