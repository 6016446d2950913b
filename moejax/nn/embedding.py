"""Embedding and output layer, the vocabulary split over `pipeline` and `tensor`.

Dimensions: v this device's rows of the vocabulary, D model, S sequence, s = S / tensor; b sequences.
"""

import jax
import jax.numpy as jnp
from jax import lax

from moejax.mesh import PIPELINE, TENSOR
from moejax.nn.collectives import psum_scatter
from moejax.nn.weights import weight
from moejax.remat import NETWORK, named
from moejax.sharding import VOCAB_AXES


def _local(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Row of each id in this device's slice of the vocabulary (clipped), and whether it lies there."""
    row = ids - lax.axis_index(VOCAB_AXES) * num_rows
    return jnp.clip(row, 0, num_rows - 1), (row >= 0) & (row < num_rows)


def embed(table_vD: jax.Array, tokens_bS: jax.Array, dtype: jnp.dtype, *, split_pipeline: bool) -> jax.Array:
    """Embeds tokens [b, S]; returns [b, s, D] on every stage, or [b / stages, s, D] if `split_pipeline`."""
    with jax.named_scope("embed"):
        row_bS, here_bS = _local(tokens_bS, table_vD.shape[0])
        x_bSD = jnp.where(here_bS[..., None], weight(table_vD, row_bS, table_vD.dtype)[row_bS], 0).astype(dtype)
        x_bsD = psum_scatter(x_bSD, TENSOR, dim=1)
        return psum_scatter(x_bsD, PIPELINE, dim=0) if split_pipeline else lax.psum(x_bsD, PIPELINE)


def logits(h_bSD: jax.Array, w_Dv: jax.Array) -> jax.Array:
    """This device's columns of the logits, float32 [b, S, v]."""
    with jax.named_scope("logits"):
        contract = (((h_bSD.ndim - 1,), (0,)), ((), ()))
        return lax.dot_general(h_bSD, weight(w_Dv, h_bSD), contract, preferred_element_type=jnp.float32)


def cross_entropy(logits_bSv: jax.Array, targets_bS: jax.Array) -> jax.Array:
    """Sum of the negative log-likelihoods in nats over [b, S]; the softmax runs over the sharded vocabulary."""
    with jax.named_scope("loss"):
        max_bS = named(lax.pmax(lax.stop_gradient(logits_bSv.max(-1)), VOCAB_AXES), NETWORK)
        normaliser_bS = named(lax.psum(jnp.exp(logits_bSv - max_bS[..., None]).sum(-1), VOCAB_AXES), NETWORK)
        column_bS, here_bS = _local(targets_bS, logits_bSv.shape[-1])
        picked_bS = jnp.take_along_axis(logits_bSv, column_bS[..., None], axis=-1)[..., 0]
        target_bS = lax.psum(jnp.where(here_bS, picked_bS, 0.0), VOCAB_AXES)
        return jnp.sum(jnp.log(normaliser_bS) + max_bS - target_bS)
