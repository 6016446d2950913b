"""Grouped products on CPUs: a loop over groups, and in it over blocks of the group's rows.

`lax.ragged_dot` is a masked dense product on CPU, groups × the ideal FLOPs. Here a group's matrix is taken out once and
its rows are visited in blocks of 512, then 256, 128 and 64, so that at most 63 rows of a group are computed for nothing
(with fewer rows a group the blocks are smaller: 64 to 8). A block may run over into rows of the next group, or be moved
back from the end of the array over rows of the last; those rows keep what they have.

Dims: N rows, e groups, D and F in and out, M rows of a block.

Measured on two cores, 16 groups of 1,024 × 4,096, CPU milliseconds of `forward` at 8,192 | 1,024 | 128 rows; a batched
product of equal groups, which is the least that it could take, needs 796 | 118 | 34:

- blocks of 512 … 64 | 64 … 8 | 64 … 8, as here: 797 | 154 | 43; 512 and 64 alone: 808; 512 … 32: 792; 256 … 64: 845;
  only 8 for 128 rows: 54. Taking the group's matrix out costs 2 ms a group, which the products of 8 rows feel.
- One `lax.switch` over the number of rows left instead of halved blocks: 1,350, for the result of a conditional is
  copied whole, 134 MB in every group; a `while` that turns once or not at all updates it in place.
- Groups unrolled: 72 against 116 GFLOP/s for 64 rows a group, for a new buffer is mapped for every group's matrix.

`drhs` adds blocks into a [D, F] accumulator, 16 MB here, which costs as much as 60 rows do. So it takes one block, as
large as it must be up to twice the mean, to which only the rest of a larger group is added: 917 | 253 | 164, against
957 | 279 | 230 with halved blocks and 841 | 198 | 138 batched. Small groups of much the same size are batched after
all, in buffers of 1.25 or 2 times the mean: a loop writes each group's result twice, which they feel. With all memory
in one arena of the allocator (experiments/common.py), where results are not mapped anew: 787 | 217 | 85 by group,
694 | 97 | 31 batched. Its `switch` returns one group's product, no copy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels import manual

_LARGEST, _SMALLEST = 512, 64  # rows: the largest block, and the smallest that the largest may be
_SMALL_GROUP = 128  # rows, mean: up to here writing a group's gradient takes longer than its product
_HALVINGS = 3  # from the largest block of a product to its smallest
_DRHS_BLOCKS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16)  # smallest blocks


def forward(x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """[N, D], [e, D, F] -> [N, F], see `moejax.kernels.grouped_matmul.api`."""
    return _rows(x_ND, w_eDF, group_sizes_e, contract=0)


def dlhs(dy_NF: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """[N, F], [e, D, F] -> [N, D]. The matrix is not transposed in memory: the product reads it either way."""
    return _rows(dy_NF, w_eDF, group_sizes_e, contract=1)


def drhs(x_ND: jax.Array, dy_NF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """[N, D], [N, F] -> [e, D, F]."""
    N, groups = x_ND.shape[0], len(group_sizes_e)
    if groups * _SMALL_GROUP < N:
        return _drhs_by_group(x_ND, dy_NF, group_sizes_e)
    axes = manual.varying(x_ND) | manual.varying(dy_NF) | manual.varying(group_sizes_e)
    rooms = sorted({-(-factor * N // (4 * groups * 8)) * 8 for factor in (5, 8)})  # 1.25 and 2 times the mean
    branches = [partial(_drhs_batched, x_ND, dy_NF, group_sizes_e, room) for room in rooms]
    branches.append(partial(_drhs_by_group, x_ND, dy_NF, group_sizes_e))
    enough = sum((group_sizes_e.max() > room).astype(jnp.int32) for room in rooms)

    def varying(branch: Callable[[], jax.Array]) -> jax.Array:
        return manual.vary(branch(), axes)

    return lax.switch(enough, [partial(varying, branch) for branch in branches])


def _drhs_batched(x_ND: jax.Array, dy_NF: jax.Array, group_sizes_e: jax.Array, room: int) -> jax.Array:
    """All groups at once, each in as much room as none of them exceeds."""
    start_e, end_e = _bounds(group_sizes_e)
    row_eM = start_e[:, None] + jnp.arange(room, dtype=group_sizes_e.dtype)[None]
    row_eM = jnp.where(row_eM < end_e[:, None], row_eM, x_ND.shape[0])
    x_eMD, dy_eMF = (a.at[row_eM].get(mode="fill", fill_value=0) for a in (x_ND, dy_NF))
    return jnp.einsum("emd,emf->edf", x_eMD, dy_eMF, preferred_element_type=jnp.float32).astype(x_ND.dtype)


def _drhs_by_group(x_ND: jax.Array, dy_NF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    N, D = x_ND.shape
    axes = manual.varying(x_ND) | manual.varying(dy_NF) | manual.varying(group_sizes_e)
    largest, smallest = _block_sizes(N, len(group_sizes_e))
    blocks = sorted({min(n * smallest, N) for n in _DRHS_BLOCKS if n * smallest <= 2 * largest})

    def product(start: jax.Array, end: jax.Array, M: int) -> jax.Array:
        at, mine_M = _block(start, end, M, N)
        x_MD = jnp.where(mine_M[:, None], lax.dynamic_slice_in_dim(x_ND, at, M), 0)
        return _dot(x_MD, lax.dynamic_slice_in_dim(dy_NF, at, M), 0, 0)

    def group(_: None, bounds: tuple[jax.Array, jax.Array]) -> tuple[None, jax.Array]:
        start, end = bounds
        none_DF = manual.vary(jnp.zeros((D, dy_NF.shape[1]), jnp.float32), axes)
        first = end - jnp.maximum((end - start - 1) // blocks[-1], 0) * blocks[-1]  # the rest are largest blocks
        enough = sum((first - start > M).astype(jnp.int32) for M in (0, *blocks[:-1]))
        products = [partial(product, start, first, M) for M in blocks]
        dw_DF = lax.switch(enough, [lambda: none_DF, *products])
        dw_DF = lax.while_loop(
            lambda state: state[0] < end,
            lambda state: (state[0] + blocks[-1], state[1] + product(state[0], end, blocks[-1])),
            (first, dw_DF),
        )[1]
        return None, dw_DF.astype(x_ND.dtype)

    return lax.scan(group, None, _bounds(group_sizes_e))[1]


def _rows(x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array, contract: int) -> jax.Array:
    """Each row times its group's matrix, over the matrix's first or second dim."""
    N = x_ND.shape[0]
    axes = manual.varying(x_ND) | manual.varying(w_eDF) | manual.varying(group_sizes_e)
    largest, smallest = _block_sizes(N, len(group_sizes_e))

    def group(y_NF: jax.Array, group: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        w_DF, start, end = group
        stop = start + (end - start + smallest - 1) // smallest * smallest

        def visit(y_NF: jax.Array, start: jax.Array, M: int) -> jax.Array:
            at, mine_M = _block(start, end, M, N)
            y_MF = _dot(lax.dynamic_slice_in_dim(x_ND, at, M), w_DF, 1, contract).astype(y_NF.dtype)
            y_MF = jnp.where(mine_M[:, None], y_MF, lax.dynamic_slice_in_dim(y_NF, at, M))
            return lax.dynamic_update_slice_in_dim(y_NF, y_MF, at, 0)

        def fits(M: int, state: tuple[jax.Array, jax.Array]) -> jax.Array:
            return state[0] + M <= stop

        def advance(M: int, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return state[0] + M, visit(state[1], state[0], min(M, N))

        for M in [largest >> halvings for halvings in range(_HALVINGS + 1)]:
            start, y_NF = lax.while_loop(partial(fits, M), partial(advance, M), (start, y_NF))
        return y_NF, None

    zero_NF = manual.vary(jnp.zeros((N, w_eDF.shape[2 - contract]), x_ND.dtype), axes)
    return lax.scan(group, zero_NF, (w_eDF, *_bounds(group_sizes_e)))[0]


def _bounds(group_sizes_e: jax.Array) -> tuple[jax.Array, jax.Array]:
    end_e = jnp.cumsum(group_sizes_e, dtype=group_sizes_e.dtype)
    return end_e - group_sizes_e, end_e


def _block_sizes(N: int, groups: int) -> tuple[int, int]:
    """The largest and the smallest block: powers of two, from the mean of a group's rows."""
    mean = max(1, N // groups)
    largest = min(_LARGEST, max(_SMALLEST, 1 << (mean - 1).bit_length()))
    return largest, largest >> _HALVINGS


def _block(start: jax.Array, end: jax.Array, M: int, N: int) -> tuple[jax.Array, jax.Array]:
    """Where M rows from `start` on can be read (earlier, at the array's end), and which of them are in the group."""
    at = jnp.minimum(start, N - M)
    row_M = at + jnp.arange(M, dtype=at.dtype)
    return at, (row_M >= start) & (row_M < end)


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    return lax.dot_general(a, b, (((a_dim,), (b_dim,)), ((), ())), preferred_element_type=jnp.float32)
