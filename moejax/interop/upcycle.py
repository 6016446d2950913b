"""Upcycling: a dense checkpoint becomes a mixture of experts (arXiv 2212.05055), by default one that computes the same.

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
            check(bool(equals), f"upcycle={text!r} has {name!r}; write num_experts=8,experts_per_token=2")
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
        check(
            not self.reinit_ratio or round(self.reinit_ratio * dense.d_ff // self.granularity) > 0,
            f"reinit_ratio={self.reinit_ratio} is less than one of an expert's {dense.d_ff // self.granularity} units",
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

    def reinitialize(self, name: str, w: jax.Array, param: Param, seed: int) -> jax.Array:
        """Returns the stacked weights `name` of experts with `reinit_ratio` of each one's hidden units drawn anew.

        Input and output weights with the same seed have the same units drawn, on every mesh.
        """
        key_units, *keys = jax.random.split(jax.random.key(seed), 3)
        is_input = name == "w_in_EDGF"
        num_units, key = param.layer_shape[-1 if is_input else -2], keys[is_input]

        def function(w: jax.Array) -> jax.Array:
            score = jax.random.uniform(key_units, (*param.stack, param.layer_shape[0], num_units))
            drawn_EF = jnp.argsort(score) < round(self.reinit_ratio * num_units)
            drawn = drawn_EF[..., None, None, :] if is_input else drawn_EF[..., None]
            of_matrix = (-3, -1) if is_input else (-2, -1)
            mean, std = w.mean(of_matrix, keepdims=True), w.std(of_matrix, keepdims=True)
            return jnp.where(drawn, mean + std * dataclasses.replace(param, std=1.0).init(key), w)

        return run_once(function, w.sharding, w)
