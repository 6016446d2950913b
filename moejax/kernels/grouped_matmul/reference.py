"""The oracle of the backends: every group times every row, masked. Groups × the ideal FLOPs; for tests."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax

_einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def forward(x_ND: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """[N, D], [e, D, F] -> [N, F], see `moejax.kernels.grouped_matmul.api`."""
    mine_eN = _mine(x_ND.shape[0], group_sizes_e)
    return _einsum("en,nd,edf->nf", mine_eN.astype(x_ND.dtype), x_ND, w_eDF).astype(x_ND.dtype)


def dlhs(dy_NF: jax.Array, w_eDF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """[N, F], [e, D, F] -> [N, D]."""
    mine_eN = _mine(dy_NF.shape[0], group_sizes_e)
    return _einsum("en,nf,edf->nd", mine_eN.astype(dy_NF.dtype), dy_NF, w_eDF).astype(dy_NF.dtype)


def drhs(x_ND: jax.Array, dy_NF: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """[N, D], [N, F] -> [e, D, F]."""
    mine_eN = _mine(x_ND.shape[0], group_sizes_e)
    return _einsum("en,nd,nf->edf", mine_eN.astype(x_ND.dtype), x_ND, dy_NF).astype(x_ND.dtype)


def _mine(N: int, group_sizes_e: jax.Array) -> jax.Array:
    end_e = jnp.cumsum(group_sizes_e, dtype=group_sizes_e.dtype)
    row_N = jnp.arange(N, dtype=group_sizes_e.dtype)
    return (row_N[None] >= (end_e - group_sizes_e)[:, None]) & (row_N[None] < end_e[:, None])
