"""SwiGLU (arXiv 2002.05202): the dense feed-forward of leading layers and of shared experts.

Tokens are split over every axis before they come here, so the weights are whole and nothing is exchanged.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.nn.weights import compute_copy
from moejax.remat import MATMUL, named


def swiglu(p: dict[str, Any], x_TD: jax.Array) -> jax.Array:
    """`(silu(x W_gate) * (x W_up)) W_out` for x [..., D]."""
    with jax.named_scope("expert"):
        h_TGF = named(jnp.einsum("...d,dgf->...gf", x_TD, compute_copy(p["w_in_DGF"], x_TD)), MATMUL)
        h_TF = jax.nn.silu(h_TGF[..., 0, :]) * h_TGF[..., 1, :]
        return jnp.einsum("...f,fd->...d", h_TF, compute_copy(p["w_out_FD"], x_TD))
