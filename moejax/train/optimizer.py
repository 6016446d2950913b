"""AdamW on sharded parameters, inside the per-device program."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from moejax import sharding
from moejax.checks import check
from moejax.config import OptimizerConfig
from moejax.kernels.manual import varying


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Returns a linear warm-up to `learning_rate`, then a cosine to its final fraction at `steps`.

    Raises:
      ConfigError: `steps` is not positive, or `warmup_steps` is not less.
    """
    check(steps > 0, f"steps={steps} must be positive")
    peak, warmup_steps = config.learning_rate, config.warmup(steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup_steps + 1),  # the first step moves already
        peak_value=peak,
        warmup_steps=warmup_steps,
        decay_steps=steps,
        end_value=peak * config.final_learning_rate_fraction,
    )


def make_optimizer(config: OptimizerConfig, steps: int, table: Any) -> optax.GradientTransformation:
    """Returns AdamW (arXiv 1711.05101) for the parameters of a table, which says which of them decay.

    It is elementwise, so it shards freely.
    """
    return optax.adamw(
        learning_rate_schedule(config, steps),
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=sharding.decayed(table),
    )


def global_norm(tree: Any) -> jax.Array:
    """The 2-norm over all devices' shards. A leaf is summed over the mesh axes it varies over: its type says which.

    `optax.global_norm` would take each device's shards for the whole, and clip every device differently.
    """
    by_axes: dict[tuple[str, ...], jax.Array] = {}
    for leaf in jax.tree.leaves(tree):
        axes = tuple(sorted(varying(leaf)))
        square = jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        by_axes[axes] = by_axes[axes] + square if axes in by_axes else square
    return jnp.sqrt(sum(lax.psum(square, axes) if axes else square for axes, square in by_axes.items()))


def clip_by_global_norm(tree: Any, max_norm: float) -> tuple[Any, jax.Array]:
    """Scales the tree down to a global norm of at most `max_norm`; returns it and the norm before."""
    norm = global_norm(tree)
    scale = jnp.minimum(1.0, max_norm / (norm + 1e-6))
    return jax.tree.map(lambda g: g * scale.astype(g.dtype), tree), norm
