"""Collectives on activations: by name, and with their results named so that rematerialization can keep them."""

import jax
from jax import lax

from moejax.remat import NETWORK, named


def all_gather(x: jax.Array, axes: str | tuple[str, ...], dim: int) -> jax.Array:
    """Concatenates the shards of `x` along `dim` over the mesh axes."""
    return named(lax.all_gather(x, axes, axis=dim, tiled=True), NETWORK)


def pmean(x: jax.Array, axes: str | tuple[str, ...]) -> jax.Array:
    """Takes the mean of `x` over the mesh axes."""
    return named(lax.pmean(x, axes), NETWORK)


def psum_scatter(x: jax.Array, axes: str | tuple[str, ...], dim: int) -> jax.Array:
    """Sums `x` over the mesh axes and keeps this device's part of `dim`."""
    return named(lax.psum_scatter(x, axes, scatter_dimension=dim, tiled=True), NETWORK)


def all_to_all(
    x: jax.Array, axes: str | tuple[str, ...], split_dim: int, concat_dim: int, groups: list[list[int]] | None = None
) -> jax.Array:
    """Sends the i-th part of `split_dim` to the i-th device of the axes; what arrives is joined along `concat_dim`.

    With `groups`, lists of device numbers along the axes, each group does so by itself.
    """
    return named(lax.all_to_all(x, axes, split_dim, concat_dim, axis_index_groups=groups, tiled=True), NETWORK)


def ragged_all_to_all(
    x: jax.Array,
    into: jax.Array,
    sizes: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    axes: str | tuple[str, ...],
    groups: list[list[int]] | None = None,
) -> jax.Array:
    """Writes slices of rows of each device's `x` into the others' `into`; `sizes` are those of `lax`' function."""
    return named(lax.ragged_all_to_all(x, into, *sizes, axis_name=axes, axis_index_groups=groups), NETWORK)
