"""Batches of several lengths: every document in the shortest rows that hold it, every length in its proportion.

The draws of a run are numbered, and what draw n is (which bucket, and which of that bucket's batches) is a function of
(lengths of the documents, buckets, seed, n) alone, as what a batch holds is in `moejax.data.loader`. So the state is
one integer here too.

Legend: B batch, S sequence length; K buckets, N draws of an epoch.
"""

from __future__ import annotations

import bisect
import functools
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from moejax.checks import check
from moejax.config import DataConfig
from moejax.data.corpora import Document
from moejax.data.encoded import Encoded, encode_documents
from moejax.data.loader import Rows, make_generator, shuffled_batches, start
from moejax.data.pieces import Report
from moejax.data.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


class BucketShape(NamedTuple):
    """Batches of `batch_size` rows of `seq_len` tokens; draws from the buckets of one `group` come in blocks."""

    seq_len: int
    batch_size: int
    group: int = 0


def make_bucketed_loader(
    config: DataConfig,
    buckets: Sequence[BucketShape],
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> grain.DatasetIterator:
    """As `moejax.data.make_loader`, with batches of several shapes; each says of which bucket it is, `bucket`, int.

    A document goes to the shortest bucket whose rows hold it with its separator, one that is too long for all to the
    longest. The documents of a bucket are packed and cut as those of a run of one length are: no padding, every token
    once in each epoch of the bucket. Buckets are drawn in proportion to their tokens (see `Draws`). A bucket without
    documents is never drawn, which a log line says.

    Raises:
      ConfigError: the buckets are not of ascending lengths, or the documents have no text.
    """
    lengths = [bucket.seq_len for bucket in buckets]
    check(lengths == sorted(set(lengths)), f"buckets have seq_len={lengths}, which must ascend")
    encoded = sort_by_length(encode_documents(documents, tokenizer, cache_dir, report), lengths)
    num_tokens = [len(of_bucket.tokens) for of_bucket in encoded]
    check(sum(num_tokens) >= 2, f"documents hold {sum(num_tokens)} tokens; at least 2 are needed, one and its target")
    for bucket, tokens in zip(buckets, num_tokens, strict=True):
        if not tokens:
            _log.warning("no document suits rows of %d tokens; that bucket is never drawn", bucket.seq_len)
    batches = {
        k: shuffled_batches(Rows(ids, bucket.seq_len, tokenizer.separator, config.seed), bucket.batch_size, config.seed)
        for k, (bucket, ids) in enumerate(zip(buckets, encoded, strict=True))
        if ids
    }
    draws = Draws(buckets, num_tokens, config.block_steps, config.seed)

    def pick(n: int) -> dict[str, Any]:
        bucket, index = draws(int(n))
        return {**batches[bucket][index], "bucket": bucket}

    return start(grain.MapDataset.range(sys.maxsize).map(pick))


def sort_by_length(encoded: Encoded, lengths: Sequence[int]) -> list[Encoded]:
    """Returns the documents for each of `lengths`, ascending: the least that holds a document has it, else the last."""
    sorted_: list[list[np.ndarray]] = [[] for _ in lengths]
    for ids in encoded:
        sorted_[min(bisect.bisect_left(lengths, len(ids)), len(lengths) - 1)].append(ids)
    return [Encoded.of(documents) for documents in sorted_]


class Draws:
    """Draw n -> (bucket, how many draws of that bucket came before), for an endless run.

    An epoch draws as many batches of each bucket as its tokens fill; what is left of a batch counts for the next epoch,
    so that proportions are exact in the long run. In an epoch, the draws of each bucket are spread evenly, but for the
    seed's jitter: any stretch of it has about its share. Then the draws of each group are gathered in blocks of
    `block_steps` (the last one may be shorter), and the blocks are spread in the same way.
    """

    def __init__(self, buckets: Sequence[BucketShape], num_tokens: Sequence[int], block_steps: int, seed: int) -> None:
        self._tokens = list(map(int, num_tokens))
        self._per_batch = [bucket.seq_len * bucket.batch_size for bucket in buckets]
        self._groups = [bucket.group for bucket in buckets]
        self._block_steps, self._seed = block_steps, seed
        self._epoch = functools.lru_cache(maxsize=4)(self._draw_epoch)

    def __call__(self, n: int) -> tuple[int, int]:
        batches_per_epoch = sum(t / b for t, b in zip(self._tokens, self._per_batch, strict=True))
        beyond = int((n + len(self._tokens) + 1) / batches_per_epoch) + 2
        epoch = bisect.bisect_right(range(beyond), n, key=lambda e: sum(self._before(e))) - 1
        before = self._before(epoch)
        buckets_N, earlier_N = self._epoch(epoch)
        place = n - sum(before)
        bucket = int(buckets_N[place])
        return bucket, before[bucket] + int(earlier_N[place])

    def _before(self, epoch: int) -> list[int]:
        """Draws of each bucket in all epochs before this one."""
        return [epoch * tokens // batch for tokens, batch in zip(self._tokens, self._per_batch, strict=True)]

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Of each draw of an epoch: its bucket, and how many of that bucket came before in this epoch."""
        rng = make_generator(self._seed, epoch)
        counts = np.subtract(self._before(epoch + 1), self._before(epoch))
        blocks: list[np.ndarray] = []
        per_group: list[int] = []
        for group in sorted(set(self._groups)):
            members = [k for k, its_group in enumerate(self._groups) if its_group == group]
            draws = np.asarray(members)[_spread([counts[k] for k in members], rng)]
            cut = [draws[i : i + self._block_steps] for i in range(0, len(draws), self._block_steps)]
            blocks += cut
            per_group.append(len(cut))
        next_block = np.cumsum([0, *per_group[:-1]])
        order: list[np.ndarray] = []
        for group in _spread(per_group, rng):
            order.append(blocks[next_block[group]])
            next_block[group] += 1
        buckets_N = np.concatenate([np.zeros(0, np.int64), *order])
        earlier_N = np.zeros(len(buckets_N), np.int64)
        for k in range(len(counts)):
            earlier_N[buckets_N == k] = np.arange(counts[k])
        return buckets_N, earlier_N


def _spread(counts: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Item k `counts[k]` times, int64: its i-th time at a random place in the i-th of as many equal stretches."""
    items = np.repeat(np.arange(len(counts)), counts)
    places = [(np.arange(count) + rng.random(count)) / count for count in counts if count]
    return items[np.argsort(np.concatenate([np.empty(0), *places]), kind="stable")]
