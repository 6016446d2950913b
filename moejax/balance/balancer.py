"""The balancer: a window of the last steps' loads, and what is decided from it: biases, buffer sizes, warnings.

Everything that is decided comes from the state alone, on the device, so that a run that was stopped goes on exactly as
if it had not been, and every process decides the same.

Dimensions: W steps of the window, L mixture-of-experts layers in logical order, E experts; R repeats, l layers of a
chunk, of one pipeline stage.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.balance.bounds import Figure, evener, roomier
from moejax.balance.losses import LayerStats, load_cv_floor
from moejax.config import BalanceConfig, DispatchConfig, ModelConfig
from moejax.mesh import PIPELINE

# How much more than a size may be wanted for it to be taken, and to be kept: a load at a boundary must not toggle it.
TAKEN_WITHIN, KEPT_WITHIN = 1.05, 1.1


class BalanceState(NamedTuple):
    """What the balancer remembers, a part of the train state: the same on every device and for every mesh.

    The last W steps are ring buffers, float32, zeros where no step has been: step n (from 0) is in row n % W.
    """

    num_steps: jax.Array  # int32, recorded so far
    load_WLE: jax.Array  # assignments to each expert
    dropped_WL: jax.Array  # assignments that reached none
    rounds_WL: jax.Array  # mean over the step's dispatches
    entropy_WL: jax.Array  # mean over tokens of the router's entropy, in nats
    size_by_load: jax.Array  # int32, index of the capacity factor that the loads ask for
    sizes_for_rounds: jax.Array  # int32, how many sizes more the rounds ask for


class BalanceReport(NamedTuple):
    """The window by layer, jax or NumPy arrays; float32 but for the counts, int32. NaN before the first step."""

    num_steps: Any  # that the window holds
    num_tokens: Any
    load_cv_floor: Any  # the CV that sampling alone gives a uniformly random router over so many tokens
    load_LE: Any  # assignments
    cv_L: Any  # coefficient of variation of the load over experts
    max_over_mean_L: Any  # the busiest expert's load; the source's MaxVio (arXiv 2408.15664) is this - 1
    dropped_fraction_L: Any
    rounds_L: Any
    entropy_L: Any  # of the router's probabilities, in nats: log E when it is undecided
    idle_experts_L: Any  # experts that got nothing

    def scalars(self) -> dict[str, Any]:
        """The figures of a line of metrics: over all layers, and those of the `_worst` layer."""
        return {
            "window_steps": self.num_steps,
            "window_tokens": self.num_tokens,
            "window_load_cv_floor": self.load_cv_floor,
            "window_load_cv": self.cv_L.mean(),
            "window_load_cv_worst": self.cv_L.max(),
            "window_load_max_over_mean": self.max_over_mean_L.mean(),
            "window_load_max_over_mean_worst": self.max_over_mean_L.max(),
            "window_dropped_fraction": self.dropped_fraction_L.mean(),
            "window_dropped_fraction_worst": self.dropped_fraction_L.max(),
            "window_rounds": self.rounds_L.mean(),
            "window_rounds_worst": self.rounds_L.max(),
            "window_router_entropy": self.entropy_L.mean(),
            "window_idle_experts": self.idle_experts_L.sum(),
        }


class ExpertLoadBalancer:
    """Keeps the experts of a model evenly loaded, or its dispatch roomy enough; says how even the load is.

    Every optimizer step it is given the global sums of the step's routing, and
    - moves the selection biases (`move_bias`), where the model has them;
    - adds the step to the window (`update`), and at the end of each window chooses the size of the dispatch's buffers
      for the next (`capacity_index`), out of the few in `capacity_factors`;
    - gives the figures of the window (`report`), and those that have bounds (`figures`).

    The losses of the router are part of the model's loss (`moejax.model.Program.loss`).
    """

    def __init__(
        self, model: ModelConfig, balance: BalanceConfig | None = None, dispatch: DispatchConfig | None = None
    ) -> None:
        self.model, self.balance, self.dispatch = model, balance or BalanceConfig(), dispatch or DispatchConfig()

    @property
    def capacity_factors(self) -> tuple[float, ...]:
        """The sizes to choose from, ascending; one where there is no choice.

        Under the strategy "capacity" the size says what is dropped, which no controller may change.
        """
        sizes = self.balance.capacity_factors
        if self.dispatch.strategy == "capacity" or len(sizes) < 2:
            return (self.dispatch.capacity_factor,)
        return sizes

    def init(self) -> BalanceState:
        """No steps yet, and the size nearest to `dispatch.capacity_factor`."""
        w, layers, experts = self.balance.window, self.model.num_moe_layers, self.model.num_experts
        # An array each, for a step donates them all.
        dropped_WL, rounds_WL, entropy_WL = (jnp.zeros((w, layers), jnp.float32) for _ in range(3))
        nearest = np.argmin(np.abs(np.asarray(self.capacity_factors) - self.dispatch.capacity_factor))
        return BalanceState(
            num_steps=jnp.zeros((), jnp.int32),
            load_WLE=jnp.zeros((w, layers, experts), jnp.float32),
            dropped_WL=dropped_WL,
            rounds_WL=rounds_WL,
            entropy_WL=entropy_WL,
            size_by_load=jnp.asarray(nearest, jnp.int32),
            sizes_for_rounds=jnp.zeros((), jnp.int32),
        )

    def move_bias(self, bias: jax.Array, count: jax.Array) -> jax.Array:
        """The selection biases [..., E] after a step in which the experts got `count` [..., E] of all tokens.

        b += rate * sign(mean load - load) (arXiv 2408.15664, algorithm 1). Their mean is then taken away: it moves no
        choice, and would drift.
        """
        bias = bias + self.balance.bias_update_rate * jnp.sign(count.mean(-1, keepdims=True) - count)
        return bias - bias.mean(-1, keepdims=True)

    def update(self, state: BalanceState, stats: LayerStats) -> BalanceState:
        """The state after a step with these global sums, of all layers: [L, E] and [L], as `every_layer` gives them."""
        row = state.num_steps % self.balance.window
        num_tokens_L = stats.count_E.sum(-1) / self.model.experts_per_token
        state = state._replace(
            num_steps=state.num_steps + 1,
            load_WLE=state.load_WLE.at[row].set(stats.count_E),
            dropped_WL=state.dropped_WL.at[row].set(stats.dropped),
            rounds_WL=state.rounds_WL.at[row].set(stats.rounds / stats.dispatches),
            entropy_WL=state.entropy_WL.at[row].set(stats.entropy / num_tokens_L),
        )
        return self._choose_size(state)

    def report(self, state: BalanceState) -> BalanceReport:
        """The figures of the window; inside or outside of `jax.jit`."""
        num_steps = jnp.minimum(state.num_steps, self.balance.window)
        load_LE = state.load_WLE.sum(0)
        assigned_L, mean_L = load_LE.sum(-1), load_LE.mean(-1)
        num_tokens = assigned_L.mean() / self.model.experts_per_token
        one_token_floor = load_cv_floor(1, self.model.experts_per_token, self.model.num_experts)
        steps = num_steps.astype(jnp.float32)
        return BalanceReport(
            num_steps=num_steps,
            num_tokens=num_tokens,
            load_cv_floor=one_token_floor * lax.rsqrt(num_tokens),
            load_LE=load_LE,
            cv_L=load_LE.std(-1) / mean_L,
            max_over_mean_L=load_LE.max(-1) / mean_L,
            dropped_fraction_L=state.dropped_WL.sum(0) / assigned_L,
            rounds_L=state.rounds_WL.sum(0) / steps,
            entropy_L=state.entropy_WL.sum(0) / steps,
            idle_experts_L=(load_LE == 0).sum(-1, dtype=jnp.int32),
        )

    def last_load(self, state: BalanceState) -> np.ndarray:
        """The assignments each expert got in the last step [L, E], float32, on the host; any process has all layers."""
        return np.asarray(state.load_WLE)[(int(state.num_steps) - 1) % self.balance.window]

    def wanted_index(self, state: BalanceState) -> jax.Array:
        """Which of `balance.capacity_factors` the next step is to run with, int32; the last, if it has not so many."""
        return state.size_by_load + state.sizes_for_rounds

    def capacity_index(self, state: BalanceState) -> jax.Array:
        """Which of `capacity_factors` the next step is to run with, int32."""
        return jnp.minimum(self.wanted_index(state), len(self.capacity_factors) - 1)

    def _choose_size(self, state: BalanceState) -> BalanceState:
        """At the end of each window, the size for the next. All steps of the window ran with the same.

        By load: the smallest size of at least `headroom` times the busiest expert's load over the mean, in the worst
        layer; 5% less will do, and to keep the size that was 10% less. By rounds: one more, where the rounds of the
        window moved more rows than the next size moves in one; this comes from tokens of a device or of a microbatch
        that are more alike than those of the window. It stays until the loads ask for another size, for the rounds of
        a size that is not run are not known.
        """
        factors, last = jnp.asarray(self.capacity_factors, jnp.float32), len(self.capacity_factors) - 1
        if last == 0:
            return state
        window = self.report(state)
        wanted = self.balance.headroom * window.max_over_mean_L.max()
        least, enough = (
            jnp.minimum(jnp.searchsorted(factors, load), last).astype(jnp.int32)
            for load in (wanted / KEPT_WITHIN, wanted / TAKEN_WITHIN)
        )
        by_load = jnp.clip(state.size_by_load, least, enough)
        index = self.capacity_index(state)
        too_many_rounds = window.rounds_L.mean() * factors[index] > factors[jnp.minimum(index + 1, last)]
        more = jnp.minimum(state.sizes_for_rounds + too_many_rounds.astype(jnp.int32), last - by_load)
        for_rounds = jnp.where(by_load == state.size_by_load, more, 0)
        due = state.num_steps % self.balance.window == 0
        return state._replace(
            size_by_load=jnp.where(due, by_load, state.size_by_load),
            sizes_for_rounds=jnp.where(due, for_rounds, state.sizes_for_rounds),
        )

    def figures(self, report: BalanceReport) -> dict[str, Figure]:
        """Returns the figures that have bounds, of the worst layer, by the name of their bound.

        They are for a `moejax.balance.BoundWatch`. There are none before the window is full. The report must be on the
        host (`jax.device_get`).
        """
        if report.num_steps < self.balance.window:
            return {}
        even, roomy = evener(self.model, self.balance), roomier(self.balance, self.dispatch)
        figures = {
            "max_load_cv": ("load CV", report.cv_L, even),
            "max_dropped_fraction": ("dropped fraction", report.dropped_fraction_L, f"{roomy}, or {even}"),
            "max_rounds": ("the number of rounds per dispatch", report.rounds_L, f"{roomy}, or {even}"),
            "max_idle_experts": ("the number of experts without a token", report.idle_experts_L, even),
        }
        return {
            name: Figure(what, layer := int(np.argmax(figure_L)), figure_L[layer], getattr(self.balance, name), remedy)
            for name, (what, figure_L, remedy) in figures.items()
        }


def every_layer(stats: LayerStats, num_layers: int) -> LayerStats:
    """This stage's global sums [R, 1, l, ...], in a `shard_map` -> those of all layers [L, ...] on every device."""
    num_stages = lax.axis_size(PIPELINE)

    def one(x_RPl: jax.Array) -> jax.Array:
        here = jnp.arange(num_stages).reshape(1, -1, *(1,) * (x_RPl.ndim - 2)) == lax.axis_index(PIPELINE)
        return lax.psum(jnp.where(here, x_RPl, jnp.zeros_like(x_RPl)), PIPELINE)

    return LayerStats(*map(one, stats)).in_order(num_layers)
