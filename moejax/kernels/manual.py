"""What a kernel needs inside `jax.shard_map(check_vma=True)`: types that say over which mesh axes an array varies.

A kernel of a library writes `pallas_call(out_shape=...)` without saying over which axes its results vary, which the
check refuses. A nested `shard_map` over the same axes, with `check_vma=False` and specs that neither split nor join, is
the public way to switch the check off for a part of a program: an island, which adds no operation. Its results come out
as if they did not vary, so they are cast back; and since autodiff through an island would sum over the wrong axes,
forward and backward pass are an island each, joined by a `custom_vjp`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P


def varying(x: jax.Array) -> frozenset[str]:
    """The mesh axes that `x` varies over; none outside a `shard_map`."""
    return jax.typeof(x).manual_axis_type.varying


def vary(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, typed as varying over `axes` as well as over those it already varies over; no data moves."""
    missing = tuple(axis for axis in axes if axis not in varying(x))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_alike(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`arrays`, each varying over every axis that one of them varies over.

    For the arguments of a `custom_vjp`, whose gradients vary over all those axes: autodiff then sums the gradient of an
    argument that varied over fewer.
    """
    axes = frozenset().union(*(varying(x) for x in arrays))
    return tuple(vary(x, axes) for x in arrays)


def unchecked(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` with the check of varying axes off inside it; its results vary over every axis that an argument varies over.

    `f` must be local to the device: no collectives. Outside a `shard_map` it is left alone.
    """

    def run(*args: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.manual_axes:
            return f(*args)
        axes = frozenset().union(*(varying(x) for x in jax.tree.leaves(args)))
        island = jax.shard_map(
            lambda *args: f(*jax.tree.map(_without_vma, args)),
            in_specs=P(),
            out_specs=P(),
            axis_names=set(mesh.manual_axes),
            check_vma=False,
        )
        return jax.tree.map(lambda x: vary(x, axes), island(*args))

    return run


def differentiable(kernel: Callable[..., jax.Array], name: str) -> Callable[..., jax.Array]:
    """A library kernel, made callable and differentiable under `check_vma=True`.

    Args:
      kernel: arrays to one array, local to the device and differentiable by itself.
      name: the `checkpoint_name` of the result and of what else the backward pass needs beside the arguments.
    """

    @jax.custom_vjp
    def call(*args: jax.Array) -> jax.Array:
        return unchecked(kernel)(*args)

    def forward(*args: jax.Array) -> tuple[jax.Array, Any]:
        static: list[Any] = []  # what `run` finds out while it is traced, beside the arrays that it returns

        def run(*args: jax.Array) -> tuple[jax.Array, list[jax.Array]]:
            out, vjp = jax.vjp(kernel, *args)
            leaves, treedef = jax.tree.flatten(vjp)
            # Arguments and the result are residuals already; a second copy would be saved, and counted, twice.
            known = {id(x): i for i, x in enumerate((*args, out))}
            sources = [known.get(id(leaf)) for leaf in leaves]
            static.extend((treedef, sources))
            return out, [leaf for leaf, source in zip(leaves, sources, strict=True) if source is None]

        out, new = jax.tree.map(lambda x: checkpoint_name(x, name), unchecked(run)(*args))
        treedef, sources = static
        known, rest = (*args, out), iter(new)
        return out, treedef.unflatten(next(rest) if source is None else known[source] for source in sources)

    def backward(vjp: Any, cotangent: jax.Array) -> tuple[Any, ...]:
        return unchecked(lambda vjp, cotangent: vjp(cotangent))(vjp, cotangent)

    call.defvjp(forward, backward)
    return lambda *args: call(*vary_alike(*args))


def _without_vma(x: jax.Array) -> jax.Array:
    # Inside the island a result has no varying axes but an argument still has its own, and `vjp` compares the two.
    # A round trip through another shape drops them, at no cost once compiled.
    return lax.squeeze(lax.expand_dims(x, (0,)), (0,))
