"""Batches: what is in one, what is refused, and what the loss counts.

A batch is {"tokens", "targets", "segment_ids"}: int32 [B, S]. A token attends to earlier ones of its own segment. A
target of -100 is left out of the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moejax.checks import check
from moejax.config import ModelConfig
from moejax.layout import Layout
from moejax.nn.embedding import IGNORED, check_ids, out_of_range

BATCH_ARRAYS = ("tokens", "targets", "segment_ids")
Batch = dict[str, jax.Array]  # `BATCH_ARRAYS`


class Totals(NamedTuple):
    """Counts over the whole batch, of all devices and accumulation slices, that the losses of its parts divide by."""

    num_sequences: int
    num_tokens: int
    num_targets: jax.Array  # int32, those that the loss counts: all but -100
    out_of_range_ids: jax.Array  # int32, tokens and counted targets that are not in the vocabulary
    count_RlE: jax.Array | None = None  # assignments to the experts of this stage's layers; None: the part is the whole

    @property
    def metrics(self) -> dict[str, jax.Array]:
        return {"num_targets": self.num_targets, "out_of_range_ids": self.out_of_range_ids}


def count_totals(batch: Batch, m: ModelConfig, layout: Layout) -> Totals:
    """Counts the global batch, of which `batch` has one device's sequences. Per-device."""
    tokens_nS, targets_nS = batch["tokens"], batch["targets"]
    with jax.named_scope("loss"):
        counted_nS = targets_nS != IGNORED
        wrong_tokens_nS = out_of_range(tokens_nS, m.vocab_size)
        wrong_targets_nS = counted_nS & out_of_range(targets_nS, m.vocab_size)
        counts = [jnp.sum(x, dtype=jnp.int32) for x in (counted_nS, wrong_tokens_nS, wrong_targets_nS)]
        num_targets, wrong_tokens, wrong_targets = lax.psum(jnp.stack(counts), layout.mesh.batch_axes)
        out_of_range_ids = wrong_tokens + wrong_targets
    shards = layout.batch_shards
    return Totals(tokens_nS.shape[0] * shards, tokens_nS.size * shards, num_targets, out_of_range_ids)


def check_batch(batch: Mapping[str, Any], vocab_size: int) -> None:
    """Raises `ConfigError` for a batch that lacks an array, or has other shapes than [B, S] or ids out of range.

    The program counts what cannot be checked here (see `moejax.nn.embedding.check_ids`) as `out_of_range_ids`.
    """
    missing = [name for name in BATCH_ARRAYS if name not in batch]
    check(not missing, f"the batch has {', '.join(batch) or 'no arrays'} and lacks {', '.join(missing)}")
    shapes = {name: np.shape(batch[name]) for name in BATCH_ARRAYS}
    check(
        len(set(shapes.values())) == 1 and len(shapes["tokens"]) == 2,
        f"the batch's shapes {shapes} must be the same [B, S] for all",
    )
    check_ids("tokens", batch["tokens"], vocab_size)
    check_ids("targets", batch["targets"], vocab_size, may_ignore=True)


def counted_targets(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the targets of a host's batch that the loss counts, in one dim."""
    return batch["targets"][batch["targets"] != IGNORED]
