"""Decides when a run says that its balance is out of bounds, and what to try.

Loads swing while a router is young, and a figure that crosses its bound once usually comes back by itself. A warning is
for a state that lasts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from moejax.config import BalanceConfig, DispatchConfig, ModelConfig

FRESH_WINDOWS = 3  # of the run, in which nothing is said
QUIET_WINDOWS = 4  # after a warning, in which the same bound gets no other
INSIDE = 0.9  # of the bound: a figure is back only below this


class Figure(NamedTuple):
    """A figure of the worst layer over the balancer's window, and its bound."""

    what: str
    layer: int
    value: float
    bound: float
    remedy: str


class BoundWatch:
    """Turns the figures of each step into warnings; it sees them all, and says little.

    A figure is said to be out of its bound when it has been for `window` steps on end, and to be back when it is below
    `INSIDE` times the bound. See the constants for when nothing is said.
    """

    def __init__(self, window: int) -> None:
        self._window = window
        self._steps_out: dict[str, int] = {}  # on end
        self._warned: dict[str, int] = {}  # step of the last warning
        self._out: set[str] = set()  # those whose return is to be said

    def update(self, step: int, figures: Mapping[str, Figure]) -> list[str]:
        """Returns the lines to print after a step.

        Args:
            step: of the run, from 1.
            figures: by the name of their bound, which is a field of `BalanceConfig`.
        """
        if step <= FRESH_WINDOWS * self._window:
            return []
        lines = (self._line(step, name, figure) for name, figure in figures.items())
        return [line for line in lines if line]

    def _line(self, step: int, name: str, figure: Figure) -> str | None:
        is_out = figure.value > figure.bound
        self._steps_out[name] = self._steps_out.get(name, 0) + 1 if is_out else 0
        if name in self._out and figure.value <= INSIDE * figure.bound:
            self._out.remove(name)
            return f"step {step}: every layer is within balance.{name}={figure.bound:g} again"
        quiet = name in self._warned and step <= self._warned[name] + QUIET_WINDOWS * self._window
        if name in self._out or quiet or self._steps_out[name] < self._window:
            return None
        self._out.add(name)
        self._warned[name] = step
        return (
            f"step {step}, layer {figure.layer}: {figure.what} is {figure.value:.3g}, more than "
            f"balance.{name}={figure.bound:g}, and has been for {self._steps_out[name]} steps; try {figure.remedy}"
        )


def evener(model: ModelConfig, balance: BalanceConfig) -> str:
    """Returns what would make loads more even: settings that are not in force already."""
    if balance.bias_update_rate > 0 and model.router.bias:
        return f"a larger balance.bias_update_rate than {balance.bias_update_rate:g}, or more optimizer.warmup_steps"
    missing = [] if balance.bias_update_rate > 0 else ["balance.bias_update_rate=0.01"]
    missing += [] if model.router.bias else ["model.router.bias=true"]
    bias = " with ".join(missing)
    if balance.aux_loss_weight > 0:
        return f"a larger balance.aux_loss_weight than {balance.aux_loss_weight:g}, or {bias}"
    return f"balance.aux_loss_weight=0.01, or {bias}"


def roomier(balance: BalanceConfig, dispatch: DispatchConfig) -> str:
    """Returns what would give the dispatch larger buffers."""
    sizes = balance.capacity_factors
    if dispatch.strategy == "capacity" or len(sizes) < 2:
        return f"a larger layout.dispatch.capacity_factor than {dispatch.capacity_factor:g}"
    return f"a larger size in balance.capacity_factors than {sizes[-1]:g}"
