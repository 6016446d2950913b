"""How tokens reach their experts: one strategy a file, all behind `Dispatcher`."""

from moejax.config import DispatchConfig
from moejax.dispatch import capacity
from moejax.dispatch.contract import Dispatcher

STRATEGIES: dict[str, Dispatcher] = {"capacity": capacity.run}


def get_dispatcher(config: DispatchConfig) -> Dispatcher:
    """The strategy that `config.strategy` names."""
    return STRATEGIES[config.strategy]


__all__ = ["STRATEGIES", "Dispatcher", "get_dispatcher"]
