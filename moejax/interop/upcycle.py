"""Upcycling: a dense checkpoint becomes a mixture of experts that computes the same at first (arXiv 2212.05055).

Every expert starts as a copy of the dense feed-forward. The router starts at random, and its gates are renormalized:
whichever experts a token visits, it gets their equal results in parts that add up to one.

With a granularity G (arXiv 2410.07524), an expert is a G-th of the feed-forward's width. G experts next to each other
are the slices of one copy. Their columns of the router are alike, so a token visits all of them or none, and each gate
is a G-th of what a whole copy would get: the output weights are multiplied by G, which makes up for it exactly.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from moejax.checks import ConfigError, check, check_positive, check_types
from moejax.config import ModelConfig, RouterConfig
from moejax.overrides import apply_overrides

ROUTER_STD = 0.02


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """What the feed-forward of a dense checkpoint becomes."""

    num_experts: int = 8  # experts per layer
    experts_per_token: int = 2  # experts that each token visits; a multiple of granularity
    granularity: int = 1  # slices that a copy of the feed-forward is cut into, each an expert

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
