"""Upcycling: a dense checkpoint becomes a mixture of experts that computes the same at first (arXiv 2212.05055).

Every expert starts as a copy of the dense feed-forward. The router starts at random, and its gates are renormalized:
whichever experts a token visits, it gets their equal results in parts that add up to one.

With a granularity G (arXiv 2410.07524), an expert is a G-th of the feed-forward's width. G experts next to each other
are the slices of one copy. Their columns of the router are alike, so a token visits all of them or none, and each gate
is a G-th of what a whole copy would get: the output weights are multiplied by G, which makes up for it exactly.

With a `reinit_ratio` (Drop-Upcycling, arXiv 2502.19261), that share of each expert's hidden units starts at random,
with the mean and standard deviation of the copied weights. Experts then differ from the start, and the model no longer
computes what the dense one does.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.checks import ConfigError, check, check_positive, check_types
from moejax.config import ModelConfig, RouterConfig
from moejax.overrides import apply_overrides
from moejax.sharding import Param, run_once

ROUTER_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """What the feed-forward of a dense checkpoint becomes."""

    num_experts: int = 8  # experts per layer
    experts_per_token: int = 2  # experts that each token visits; a multiple of granularity
    granularity: int = 1  # slices that a copy of the feed-forward is cut into, each an expert
    reinit_ratio: float = 0.0  # share of each expert's hidden units that start at random; 0: all are copies

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "num_experts", "experts_per_token", "granularity")
        for name in ("num_experts", "experts_per_token"):
            value = getattr(self, name)
            check(value % self.granularity == 0, f"{name}={value} must be a multiple of granularity={self.granularity}")
        check(
            self.experts_per_token > 1,
            f"experts_per_token={self.experts_per_token} must be more than 1: a single gate would always be 1, and the "
            "router would learn nothing",
        )
        check(0 <= self.reinit_ratio <= 1, f"reinit_ratio={self.reinit_ratio} must be from 0 to 1")

    @classmethod
    def parse(cls, text: str) -> Upcycling:
        """Returns what `text` says, such as "num_experts=8,experts_per_token=2".

        Raises:
          ConfigError: a field that does not exist, or a wrong value.
        """
        pairs = [part.partition("=") for part in text.split(",")]
        for name, equals, _ in pairs:
            check(bool(equals), f"upcycle={text!r} has {name!r}; write num_experts=8,experts_per_token=2,granularity=1")
        try:
            return apply_overrides(cls(), {name.strip(): value for name, _, value in pairs})
        except ConfigError as error:
            raise ConfigError(f"upcycle={text!r}: {error}") from None

    def model(self, dense: ModelConfig) -> ModelConfig:
        """Returns the mixture of experts that a dense model becomes.

        Raises:
          ConfigError: the model has experts already, or a feed-forward that the granularity does not divide.
        """
        check(dense.num_experts == 1, f"a model of {dense.num_experts} experts cannot be upcycled; give a dense one")
        check(
            dense.d_ff % self.granularity == 0,
            f"granularity={self.granularity} must divide the feed-forward's width, {dense.d_ff}",
        )
        return dataclasses.replace(
            dense, d_ff=dense.d_ff // self.granularity, num_experts=self.num_experts,
            experts_per_token=self.experts_per_token, router=RouterConfig(),
        )  # fmt: skip

    def router(self, num_layers: int, d_model: int, seed: int) -> np.ndarray:
        """Returns the first weights of all routers, float32 [num_layers, d_model, num_experts]."""
        copies = self.num_experts // self.granularity
        w_LDC = np.random.default_rng(seed).normal(0, ROUTER_STD, (num_layers, d_model, copies)).astype(np.float32)
        return np.repeat(w_LDC, self.granularity, axis=-1)

    def reinitialize(self, experts: dict[str, jax.Array], table: dict[str, Param], seed: int) -> dict[str, jax.Array]:
        """Returns stacked experts with `reinit_ratio` of the hidden units of each drawn anew, where they are stored.

        Input and output weights of a unit go together. The same seed draws the same on every mesh.
        """
        param, out = (dataclasses.replace(table[name], std=1.0) for name in ("w_in_EDGF", "w_out_EFD"))
        E, _, _, F = param.layer_shape
        key_units, key_in, key_out = jax.random.split(jax.random.key(seed), 3)

        def function(w_in_EDGF: jax.Array, w_out_EFD: jax.Array) -> dict[str, jax.Array]:
            order_LEF = jnp.argsort(jax.random.uniform(key_units, (param.num_layers, E, F)))
            filler = math.prod(param.stack) - param.num_layers
            drawn_LEF = jnp.pad(order_LEF < round(self.reinit_ratio * F), ((0, filler), (0, 0), (0, 0)))
            drawn_EF = drawn_LEF.reshape(*param.stack, E, F)
            new_in_EDGF = _like(w_in_EDGF, param.init(key_in), axes=(-3, -1))
            new_out_EFD = _like(w_out_EFD, out.init(key_out), axes=(-2, -1))
            return {
                "w_in_EDGF": jnp.where(drawn_EF[..., None, None, :], new_in_EDGF, w_in_EDGF),
                "w_out_EFD": jnp.where(drawn_EF[..., None], new_out_EFD, w_out_EFD),
            }

        return run_once(function, {name: w.sharding for name, w in experts.items()}, *experts.values())


def _like(w: jax.Array, normal: jax.Array, axes: tuple[int, int]) -> jax.Array:
    """Returns normal values with the mean and standard deviation of `w` over `axes`."""
    return w.mean(axes, keepdims=True) + w.std(axes, keepdims=True) * normal
