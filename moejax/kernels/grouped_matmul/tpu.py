"""Grouped products on TPUs: megablox, the kernels `gmm` and `tgmm` that come with jax.

Compiled ahead of time for v5p, not timed. The rows past the end are one more group, which has no matrix: without it
megablox would leave them as it finds them.

Dims: N rows, e groups, D and F in and out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

from moejax.kernels import manual
from moejax.kernels.grouped_matmul import cost


def forward(x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[N, D], [e, D, F] -> [N, F], see `moejax.kernels.grouped_matmul.api`.

    `interpret` evaluates the kernel's body with plain jax operations, on any device: slow, for tests.
    """
    return manual.unchecked(functools.partial(_rows, False, interpret))(x_ND, w_eDF, group_sizes_e)


def dlhs(dy_NF: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[N, F], [e, D, F] -> [N, D]."""
    return manual.unchecked(functools.partial(_rows, True, interpret))(dy_NF, w_eDF, group_sizes_e)


def drhs(x_ND: jax.Array, dy_NF: jax.Array, group_sizes_e: jax.Array, *, interpret: bool = False) -> jax.Array:
    """[N, D], [N, F] -> [e, D, F]."""
    return manual.unchecked(functools.partial(_groups, interpret))(x_ND, dy_NF, group_sizes_e)


def _rows(transposed: bool, interpret: bool, x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    N, D = x_ND.shape
    tiling = _tiling(N, D, w_eDF.shape[1 if transposed else 2])
    x_ND = _pad(x_ND, tiling[0])
    sizes = _with_rest(group_sizes_e, x_ND.shape[0])
    y_NF = gmm(x_ND, w_eDF, sizes, x_ND.dtype, tiling, transpose_rhs=transposed, interpret=interpret)
    return y_NF[:N]


def _groups(interpret: bool, x_ND: jax.Array, dy_NF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    tiling = _tiling(*x_ND.shape, dy_NF.shape[1])
    x_ND, dy_NF = _pad(x_ND, tiling[0]), _pad(dy_NF, tiling[0])
    sizes = _with_rest(group_sizes_e, x_ND.shape[0])
    with jax.numpy_dtype_promotion("standard"):  # tgmm's metadata mixes booleans and integers
        return tgmm(x_ND.T, dy_NF, sizes, x_ND.dtype, tiling, num_actual_groups=len(group_sizes_e), interpret=interpret)


def _with_rest(group_sizes_e: jax.Array, N: int) -> jax.Array:
    return jnp.concatenate([group_sizes_e, (N - group_sizes_e.sum(dtype=jnp.int32))[None]])


def _pad(x_ND: jax.Array, tile: int) -> jax.Array:
    return jnp.pad(x_ND, ((0, -x_ND.shape[0] % tile), (0, 0)))


def _tiling(*dims: int) -> tuple[int, ...]:
    return tuple(map(cost.tile, dims))
