"""Embedding and output layer, the vocabulary split over `pipeline` and `tensor`.

Dimensions: v this device's rows of the vocabulary, D model, S sequence, s = S / tensor; b sequences.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.checks import check
from moejax.layout import VOCAB_AXES
from moejax.mesh import PIPELINE, TENSOR
from moejax.nn.collectives import psum_scatter
from moejax.nn.weights import compute_copy
from moejax.remat import NETWORK, named

IGNORED = -100  # a target that the loss leaves out, as in PyTorch and in the collators of many libraries


def out_of_range(ids: Any, vocab_size: int) -> Any:
    """Returns which ids, jax or NumPy, are not tokens of the vocabulary."""
    return (ids < 0) | (ids >= vocab_size)


def check_ids(name: str, ids: Any, vocab_size: int, *, may_ignore: bool = False) -> None:
    """Raises `ConfigError` for the first id that is not a token, and not `IGNORED` where that is allowed.

    Passes arrays whose values this process cannot read: traced ones, and those of several processes.
    """
    if isinstance(ids, jax.core.Tracer) or (isinstance(ids, jax.Array) and not ids.is_fully_addressable):
        return
    ids = np.asarray(ids)
    check(ids.dtype.kind in "iu", f"{name} has dtype {ids.dtype}; ids must be integers")
    wrong = out_of_range(ids, vocab_size) & ~(may_ignore & (ids == IGNORED))
    for position in np.argwhere(wrong)[:1].tolist():
        also = f", or {IGNORED} for a target to leave out" if may_ignore else ""
        check(
            False,
            f"{name}{position}={ids[tuple(position)]} must be from 0 to {vocab_size - 1} with "
            f"vocab_size={vocab_size}{also}",
        )


def _local(ids: jax.Array, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """Row of each id in this device's slice of the vocabulary (clipped), and whether it lies there."""
    row = ids - lax.axis_index(VOCAB_AXES) * num_rows
    return jnp.clip(row, 0, num_rows - 1), (row >= 0) & (row < num_rows)


def embed(
    table_vD: jax.Array, tokens_bS: jax.Array, dtype: jnp.dtype, *, vocab_size: int, split_pipeline: bool
) -> jax.Array:
    """Embeds tokens [b, S]; returns [b, s, D] on every stage, or [b / stages, s, D] if `split_pipeline`.

    An id that is not in the vocabulary has NaN for its embedding, as in `jnp.take`.
    """
    with jax.named_scope("embed"):
        num_rows = table_vD.shape[0]
        row_bS, here_bS = _local(tokens_bS, num_rows)
        unknown_bS = out_of_range(tokens_bS, vocab_size)
        elsewhere_bS = jnp.where(unknown_bS, jnp.nan, jnp.zeros((), table_vD.dtype))
        rows_bSD = compute_copy(table_vD, row_bS, table_vD.dtype)[row_bS]
        x_bSD = jnp.where(here_bS[..., None], rows_bSD, elsewhere_bS[..., None]).astype(dtype)
        x_bsD = psum_scatter(x_bSD, TENSOR, dim=1)
        return psum_scatter(x_bsD, PIPELINE, dim=0) if split_pipeline else lax.psum(x_bsD, PIPELINE)


def logits(h_bSD: jax.Array, w_Dv: jax.Array, vocab_size: int) -> jax.Array:
    """This device's columns of the logits, float32 [b, S, v]; -inf in those that pad the vocabulary."""
    with jax.named_scope("logits"):
        contract = (((h_bSD.ndim - 1,), (0,)), ((), ()))
        y_bSv = lax.dot_general(h_bSD, compute_copy(w_Dv, h_bSD), contract, preferred_element_type=jnp.float32)
        num_columns = w_Dv.shape[-1]
        if num_columns * lax.axis_size(VOCAB_AXES) == vocab_size:
            return y_bSv
        id_v = lax.axis_index(VOCAB_AXES) * num_columns + jnp.arange(num_columns)
        return jnp.where(id_v < vocab_size, y_bSv, -jnp.inf)


def cross_entropy(logits_bSv: jax.Array, targets_bS: jax.Array, vocab_size: int) -> jax.Array:
    """Sums the negative log-likelihoods in nats over [b, S]; the softmax runs over the sharded vocabulary.

    Targets of `IGNORED` add nothing. Any other target that is not in the vocabulary makes the sum NaN.
    """
    with jax.named_scope("loss"):
        max_bS = named(lax.pmax(lax.stop_gradient(logits_bSv.max(-1)), VOCAB_AXES), NETWORK)
        normalizer_bS = named(lax.psum(jnp.exp(logits_bSv - max_bS[..., None]).sum(-1), VOCAB_AXES), NETWORK)
        column_bS, here_bS = _local(targets_bS, logits_bSv.shape[-1])
        picked_bS = jnp.take_along_axis(logits_bSv, column_bS[..., None], axis=-1)[..., 0]
        target_bS = lax.psum(jnp.where(here_bS, picked_bS, 0.0), VOCAB_AXES)
        nats_bS = jnp.log(normalizer_bS) + max_bS - target_bS
        unknown_bS = out_of_range(targets_bS, vocab_size)
        return jnp.sum(jnp.where(targets_bS == IGNORED, 0.0, jnp.where(unknown_bS, jnp.nan, nats_bS)))
