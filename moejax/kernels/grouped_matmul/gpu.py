"""Grouped products on GPUs: two Pallas kernels, lowered through Triton.

Written here because no library's serves: `lax.ragged_dot` lowers to a dense product on an H100, of x repeated and
masked for every group (Mixtral's shape, 8,192 rows: 0.5 GB of them and 8 × the FLOPs). jax's `ragged_dot_mgpu` is for
Hopper's 16-bit types only, leaves rows past the end unset, and its counterpart for `drhs` asks the device for its cores
while it is traced. So do tokamax's Mosaic kernels; its Triton ones, which by its own records on an H100 are the faster
(649 TFLOP/s forward against 461, 390–595 against 108–150 in `drhs`), come with a framework for tuning and quantization.
A batched product of padded groups computes as many rows as the largest group has for each.

The block sizes here are the ones that tokamax's records prefer on an H100; they were compiled for one, but not timed.
jax 0.11 announces the end of Pallas' way through Triton, so expect to replace this file.

Dims: N rows, e groups, D and F in and out. `forward` visits the blocks of every group's rows. A group's first block
starts at its first row, so that no block belongs to two groups; the rows past the end are one more group, whose blocks
are stored as zeros. `drhs` has a program for every [D, F] block of every group, which runs over the group's rows.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moejax.kernels import manual

_VISITS_TOGETHER = 8  # visits whose programs run side by side over all columns, so that both operands stay in the L2


class Blocks(NamedTuple):
    """Rows, columns and contracted elements that a program multiplies at a time, and how it is run."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


_LARGE = Blocks(128, 256, 64, warps=8, stages=3)  # 147 KB of shared memory for 16 bits
_SMALL = Blocks(128, 128, 32, warps=4, stages=3)


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
    N, F = x_ND.shape[0], w_eDF.shape[1 if transposed else 2]
    blocks = _blocks(x_ND.dtype, F)
    visits = _visits(group_sizes_e, N, blocks.rows)
    columns = pl.cdiv(F, blocks.columns)
    return _call(
        functools.partial(_rows_kernel, blocks=blocks, transposed=transposed),
        jax.ShapeDtypeStruct((N, F), x_ND.dtype),
        (len(visits[0]) * columns,),
        blocks,
        interpret,
        "grouped_matmul_dlhs" if transposed else "grouped_matmul_forward",
    )(*visits, x_ND, w_eDF)


def _groups(interpret: bool, x_ND: jax.Array, dy_NF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    D, F = x_ND.shape[1], dy_NF.shape[1]
    blocks = _blocks(x_ND.dtype, F)
    end_e = jnp.cumsum(group_sizes_e, dtype=jnp.int32)
    return _call(
        functools.partial(_groups_kernel, blocks=blocks),
        jax.ShapeDtypeStruct((len(group_sizes_e), D, F), x_ND.dtype),
        (pl.cdiv(D, blocks.rows), pl.cdiv(F, blocks.columns), len(group_sizes_e)),
        blocks,
        interpret,
        "grouped_matmul_drhs",
    )(end_e - group_sizes_e, end_e, x_ND, dy_NF)


def _call(
    kernel: Any, out_shape: jax.ShapeDtypeStruct, grid: tuple[int, ...], blocks: Blocks, interpret: bool, name: str
) -> Any:
    params = triton.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages)
    return pl.pallas_call(
        kernel, out_shape=out_shape, grid=grid, compiler_params=params, interpret=interpret, name=name
    )


def _blocks(dtype: jnp.dtype, columns: int) -> Blocks:
    return _LARGE if columns >= _LARGE.columns and dtype.itemsize == 2 else _SMALL


def _visits(group_sizes_e: jax.Array, N: int, block: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Group, first row and end of the group for each block of rows, int32; a visit that is not needed has no rows.

    Group e is the rows past the end. However the rows are spread, there are at most N // block + e + 1 blocks.
    """
    groups = len(group_sizes_e) + 1
    group_sizes_g = jnp.concatenate([group_sizes_e, (N - group_sizes_e.sum(dtype=jnp.int32))[None]])
    end_g = jnp.cumsum(group_sizes_g, dtype=jnp.int32)
    last_g = jnp.cumsum(pl.cdiv(group_sizes_g, block), dtype=jnp.int32)  # visits up to the end of each group
    visit_V = jnp.arange(N // block + groups, dtype=jnp.int32)
    group_V = (visit_V[:, None] >= last_g[None]).sum(1, dtype=jnp.int32)
    needed_V = group_V < groups
    group_V = jnp.minimum(group_V, groups - 1)
    visit_in_group_V = visit_V - (last_g - pl.cdiv(group_sizes_g, block))[group_V]
    first_V = (end_g - group_sizes_g)[group_V] + visit_in_group_V * block
    return group_V, jnp.where(needed_V, first_V, N), jnp.where(needed_V, end_g[group_V], N)


def _rows_kernel(
    group_ref: Any,
    first_ref: Any,
    end_ref: Any,
    x_ref: Any,
    w_ref: Any,
    y_ref: Any,
    *,
    blocks: Blocks,
    transposed: bool,
) -> None:
    visit, column = _visit_and_column(group_ref.shape[0], pl.cdiv(y_ref.shape[1], blocks.columns))
    group, first, end = (triton.load(ref.at[visit]) for ref in (group_ref, first_ref, end_ref))
    D, F = x_ref.shape[1], y_ref.shape[1]
    row, col = pl.ds(first, blocks.rows), pl.ds(column * blocks.columns, blocks.columns)
    row_ok = first + jnp.arange(blocks.rows, dtype=jnp.int32) < end
    col_ok = column * blocks.columns + jnp.arange(blocks.columns, dtype=jnp.int32) < F

    def accumulate(step: jax.Array, acc: jax.Array) -> jax.Array:
        inner = pl.ds(step * blocks.inner, blocks.inner)
        inner_ok = step * blocks.inner + jnp.arange(blocks.inner, dtype=jnp.int32) < D
        x = triton.load(x_ref.at[row, inner], mask=row_ok[:, None] & inner_ok[None], other=0)
        if transposed:
            w = triton.load(w_ref.at[group, col, inner], mask=col_ok[:, None] & inner_ok[None], other=0).T
        else:
            w = triton.load(w_ref.at[group, inner, col], mask=inner_ok[:, None] & col_ok[None], other=0)
        return acc + triton.dot(x, w)

    @pl.when(first < end)
    def _() -> None:
        steps = (group < w_ref.shape[0]).astype(jnp.int32) * pl.cdiv(D, blocks.inner)  # the rows past the end: none
        acc = lax.fori_loop(0, steps, accumulate, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
        triton.store(y_ref.at[row, col], acc.astype(y_ref.dtype), mask=row_ok[:, None] & col_ok[None])


def _visit_and_column(visits: int, columns: int) -> tuple[jax.Array, jax.Array]:
    """This program's place: visits fastest inside a band of `_VISITS_TOGETHER`, then columns, then bands."""
    program = pl.program_id(0)
    band = program // (_VISITS_TOGETHER * columns)
    width = jnp.minimum(visits - band * _VISITS_TOGETHER, _VISITS_TOGETHER)
    within = program - band * (_VISITS_TOGETHER * columns)
    return band * _VISITS_TOGETHER + within % width, within // width


def _groups_kernel(start_ref: Any, end_ref: Any, x_ref: Any, dy_ref: Any, dw_ref: Any, *, blocks: Blocks) -> None:
    group = pl.program_id(2)
    start, end = triton.load(start_ref.at[group]), triton.load(end_ref.at[group])
    _, D, F = dw_ref.shape
    first_d, first_f = pl.program_id(0) * blocks.rows, pl.program_id(1) * blocks.columns
    d, f = pl.ds(first_d, blocks.rows), pl.ds(first_f, blocks.columns)
    d_ok = first_d + jnp.arange(blocks.rows, dtype=jnp.int32) < D
    f_ok = first_f + jnp.arange(blocks.columns, dtype=jnp.int32) < F

    def accumulate(step: jax.Array, acc: jax.Array) -> jax.Array:
        first = start + step * blocks.inner
        row = pl.ds(first, blocks.inner)
        row_ok = first + jnp.arange(blocks.inner, dtype=jnp.int32) < end
        x = triton.load(x_ref.at[row, d], mask=row_ok[:, None] & d_ok[None], other=0)
        dy = triton.load(dy_ref.at[row, f], mask=row_ok[:, None] & f_ok[None], other=0)
        return acc + triton.dot(x.T, dy)

    steps = pl.cdiv(end - start, blocks.inner)
    acc = lax.fori_loop(0, steps, accumulate, jnp.zeros((blocks.rows, blocks.columns), jnp.float32))
    triton.store(dw_ref.at[group, d, f], acc.astype(dw_ref.dtype), mask=d_ok[:, None] & f_ok[None])
