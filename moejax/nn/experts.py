"""The experts: one SwiGLU each, over this device's experts: on buffers of equal size, or on rows sorted by expert.

Dimensions: e this device's experts, C rows of an expert's buffer, N rows of all, D model, G=2 (gate, up), f this
device's part of F.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.kernels.grouped_matmul import grouped_matmul
from moejax.mesh import TENSOR
from moejax.nn.collectives import all_gather, psum_scatter
from moejax.nn.weights import compute_copy
from moejax.remat import MATMUL, named


def whole_experts(p: dict[str, Any], x_eCD: jax.Array) -> jax.Array:
    """Applies experts that are whole on one device to a buffer each: [e, C, D] -> [e, C, D], no collective."""
    with jax.named_scope("expert"):
        h_eCGf = named(jnp.einsum("ecd,edgf->ecgf", x_eCD, compute_copy(p["w_in_EDGF"], x_eCD)), MATMUL)
        h_eCf = jax.nn.silu(h_eCGf[:, :, 0]) * h_eCGf[:, :, 1]
        return jnp.einsum("ecf,efd->ecd", h_eCf, compute_copy(p["w_out_EFD"], x_eCD))


def split_experts(p: dict[str, Any], x_eCD: jax.Array) -> jax.Array:
    """Applies experts whose width is split over `tensor`: rows are gathered, partial results summed and scattered."""
    with jax.named_scope("expert"):
        y_eCD = whole_experts(p, all_gather(x_eCD, TENSOR, dim=1))
        return psum_scatter(y_eCD, TENSOR, dim=1)


def grouped_experts(p: dict[str, Any], x_ND: jax.Array, group_sizes_e: jax.Array) -> jax.Array:
    """Applies experts that are whole on one device to rows sorted by expert: [N, D] -> [N, D], no collective.

    The first `group_sizes_e[0]` rows are of the first expert, and so on. Rows past the last expert's give zeros.
    """
    with jax.named_scope("expert"):
        w_in_EDGF, w_out_EFD = (compute_copy(p[name], x_ND) for name in ("w_in_EDGF", "w_out_EFD"))
        w_in_EDH = w_in_EDGF.reshape(*w_in_EDGF.shape[:2], -1)  # H = G F: gate, then up
        gate_Nf, up_Nf = jnp.split(named(grouped_matmul(x_ND, w_in_EDH, group_sizes_e), MATMUL), 2, axis=1)
        return grouped_matmul(jax.nn.silu(gate_Nf) * up_Nf, w_out_EFD, group_sizes_e)
