"""The experts: one SwiGLU each, batched over this device's experts.

Dimensions: e this device's experts, C rows of an expert's buffer, D model, G=2 (gate, up), f this device's part of F.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.mesh import TENSOR
from moejax.nn.collectives import all_gather, psum_scatter
from moejax.remat import MATMUL, named


def whole_experts(p: dict[str, Any], x_eCD: jax.Array) -> jax.Array:
    """Every expert lies on one device: [e, C, D] -> [e, C, D], no collective."""
    with jax.named_scope("expert"):
        h_eCGf = named(jnp.einsum("ecd,edgf->ecgf", x_eCD, p["w_in_EDGF"].astype(x_eCD.dtype)), MATMUL)
        h_eCf = jax.nn.silu(h_eCGf[:, :, 0]) * h_eCGf[:, :, 1]
        return jnp.einsum("ecf,efd->ecd", h_eCf, p["w_out_EFD"].astype(x_eCD.dtype))


def split_experts(p: dict[str, Any], x_eCD: jax.Array) -> jax.Array:
    """Every expert's width is split over `tensor`: rows are gathered over it, partial results summed and scattered."""
    y_eCD = whole_experts(p, all_gather(x_eCD, TENSOR, dim=1))
    return psum_scatter(y_eCD, TENSOR, dim=1)


def grouped_experts(p: dict[str, Any], x_ND: jax.Array, size_e: jax.Array) -> jax.Array:
    """Rows sorted by expert, so many of each: [N, D] -> [N, D]; zeros behind the last."""
    with jax.named_scope("expert"):
        w_in = p["w_in_EDGF"].astype(x_ND.dtype).reshape(*p["w_in_EDGF"].shape[:2], -1)
        h_NGf = jax.lax.ragged_dot(x_ND, w_in, size_e).reshape(x_ND.shape[0], 2, -1)
        h_Nf = jax.nn.silu(h_NGf[:, 0]) * h_NGf[:, 1]
        return jax.lax.ragged_dot(h_Nf, p["w_out_EFD"].astype(x_ND.dtype), size_e)
