"""The train state's way between meshes of the same devices, and between stackings of the layers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from moejax.sharding import NUM_STACK_DIMS


def lie_alike(template: Any, other: Any) -> bool:
    """Whether the leaves of two trees of `jax.ShapeDtypeStruct`s have the same shapes and shardings."""
    pairs = zip(jax.tree.leaves(template), jax.tree.leaves(other), strict=True)
    return all(one.shape == two.shape and one.sharding == two.sharding for one, two in pairs)


def reshard(tree: Any, template: Any, *, donate: bool = False) -> Any:
    """The arrays of `tree` as the `template`'s shapes and shardings say: the same numbers, to the bit.

    Leaf by leaf, so that at most one is there twice: with `donate`, what is moved is deleted.

    Args:
        tree: `jax.Array`s.
        template: `jax.ShapeDtypeStruct`s with a `NamedSharding` on a mesh of the same devices. A leaf's leading three
            dims may be stacked differently.
    """

    def move(leaf: jax.Array, want: jax.ShapeDtypeStruct) -> jax.Array:
        if leaf.shape == want.shape and leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim):
            return jax.device_put(leaf, want.sharding)  # the same memory
        restacked = leaf.shape != want.shape
        moved = jax.device_put(leaf, restackable(leaf.shape, want.sharding) if restacked else want.sharding)
        if restacked:
            moved = restack(moved, want.shape, want.sharding)
        elif donate:
            moved = jnp.copy(moved)  # what stays on its device would be shared with what is deleted
        jax.block_until_ready(moved)
        if donate:
            leaf.delete()
        return moved

    return jax.tree.map(move, tree, template)


def restackable(shape: tuple[int, ...], wanted: NamedSharding) -> NamedSharding:
    """A sharding of a leaf's present `shape`, before it is restacked, as close to the `wanted` one as its dims divide.

    Trailing dims keep theirs. The mesh axes of a leading dim that they do not divide move to another leading dim that
    they do, or are dropped: the leaf is then replicated over them until it has been reshaped.
    """
    spec = list(wanted.spec) + [None] * (len(shape) - len(wanted.spec))
    leading: list[Any] = [None] * NUM_STACK_DIMS
    for dim, axes in enumerate(spec[:NUM_STACK_DIMS]):
        names = () if axes is None else (axes,) if isinstance(axes, str) else axes
        size = math.prod(wanted.mesh.shape[name] for name in names)
        candidates = [dim, *(other for other in range(NUM_STACK_DIMS) if spec[other] is None)]
        fits = [d for d in candidates if leading[d] is None and shape[d] % size == 0]
        if names and fits:
            leading[fits[0]] = axes
    return NamedSharding(wanted.mesh, PartitionSpec(*leading, *spec[NUM_STACK_DIMS:]), memory_kind=wanted.memory_kind)


def _num_places(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:NUM_STACK_DIMS])


def fits(leaf: jax.Array, shape: tuple[int, ...]) -> bool:
    """Returns whether `restack` to `shape` leaves out nothing but zeros."""
    have, want = _num_places(leaf.shape), _num_places(shape)
    if have <= want:
        return True
    places = jnp.arange(have).reshape(*leaf.shape[:NUM_STACK_DIMS], *(1,) * (leaf.ndim - NUM_STACK_DIMS))
    return not bool(jax.jit(lambda x: ((x != 0) & (places >= want)).any())(leaf))


def restack(leaf: jax.Array, shape: tuple[int, ...], sharding: NamedSharding) -> jax.Array:
    """The leaf with its leading dims stacked as those of `shape`, which is to lie as `sharding` says.

    Where `shape` has more places for layers, those at the end are 0; where it has fewer, they are left out. Then each
    device holds the shards of all stages for a moment.
    """
    explicit = AxisType.Explicit in sharding.mesh.axis_types
    have, want = _num_places(leaf.shape), _num_places(shape)
    rest = leaf.shape[NUM_STACK_DIMS:]
    in_a_row = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[NUM_STACK_DIMS:]))

    def reshape(x: jax.Array, shape: tuple[int, ...], lies: NamedSharding) -> jax.Array:
        # An explicit mesh must be told the sharding, and an automatic one must not be.
        return jax.lax.reshape(x, shape, out_sharding=lies if explicit else None)

    def function(x: jax.Array) -> jax.Array:
        if have != want:
            x = reshape(x, (have, *rest), in_a_row)[:want]
            x = jnp.pad(x, ((0, max(0, want - have)), *((0, 0),) * len(rest)))
        return reshape(x, shape, sharding)

    return jax.jit(function, out_shardings=sharding)(leaf)
