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
        return _output(p, _hidden(p, x_TD))


def gated_swiglu(p: dict[str, Any], x_TD: jax.Array) -> jax.Array:
    """`sigmoid(x w) * swiglu(x)`, where `w` is a vector: a gate for each token."""
    with jax.named_scope("expert"):
        gate_T = jax.nn.sigmoid(named(jnp.einsum("...d,d->...", x_TD, compute_copy(p["w_gate_D"], x_TD)), MATMUL))
        # On hidden rows it is the same as on the result, which the backward pass would have to compute again.
        return _output(p, _hidden(p, x_TD) * gate_T[..., None])


def _hidden(p: dict[str, Any], x_TD: jax.Array) -> jax.Array:
    h_TGF = named(jnp.einsum("...d,dgf->...gf", x_TD, compute_copy(p["w_in_DGF"], x_TD)), MATMUL)
    return jax.nn.silu(h_TGF[..., 0, :]) * h_TGF[..., 1, :]


def _output(p: dict[str, Any], h_TF: jax.Array) -> jax.Array:
    return jnp.einsum("...f,fd->...d", h_TF, compute_copy(p["w_out_FD"], h_TF))
