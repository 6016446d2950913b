"""Every document is in the shortest rows that hold it, every row comes once an epoch, and draws are in proportion."""

import itertools
import logging

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import FIELDS, assert_batches_equal, take

from moejax.checks import ConfigError
from moejax.config import DataConfig
from moejax.data import BucketShape, ByteTokenizer, Document, make_bucketed_loader, make_loader
from moejax.data.buckets import Draws, sort_by_length
from moejax.data.loader import Rows, encode_documents

CONFIG = DataConfig(seed=3, block_steps=2)
BUCKETS = [BucketShape(4, 3), BucketShape(8, 2, group=1), BucketShape(16, 1, group=1)]
DOCUMENTS = [Document(str(i), chr(40 + i) * (1 + 5 * i % 23)) for i in range(40)]  # each of one character
ENCODED = sort_by_length(encode_documents(DOCUMENTS, ByteTokenizer()), [4, 8, 16])

proportions = st.lists(st.tuples(st.integers(0, 3000), st.integers(1, 9), st.integers(0, 1)), min_size=1, max_size=4)


def loader(documents=DOCUMENTS, buckets=BUCKETS, config=CONFIG):
    return make_bucketed_loader(config, buckets, documents, ByteTokenizer())


def test_a_document_is_in_the_shortest_rows_that_hold_it():
    for limits, encoded in zip([(0, 4), (4, 8), (8, 10**9)], ENCODED, strict=True):
        assert encoded
        assert all(limits[0] < len(ids) <= limits[1] for ids in encoded)
    assert sum(map(len, ENCODED)) == len(DOCUMENTS)


def test_batches_have_their_buckets_shape_and_documents():
    characters = [{ids[-1] for ids in encoded} for encoded in ENCODED]
    for batch in take(loader(), 60):
        bucket = BUCKETS[batch["bucket"]]
        assert {name: (batch[name].shape, batch[name].dtype) for name in FIELDS} == dict.fromkeys(
            FIELDS, ((bucket.batch_size, bucket.seq_len), np.int32)
        )
        assert set(batch["tokens"].flat) <= {0} | characters[batch["bucket"]]


def test_nothing_is_lost_or_repeated_in_an_epoch_of_a_bucket():
    """The rows of as many epochs of a bucket as end with a batch are those of its stream, each once."""
    batches = take(loader(), 400)
    for k, (bucket, encoded) in enumerate(zip(BUCKETS, ENCODED, strict=True)):
        rows = Rows(encoded, bucket.seq_len, 0, CONFIG.seed)
        drawn = np.concatenate([batch["tokens"] for batch in batches if batch["bucket"] == k])
        epochs = bucket.batch_size
        expected = rows(np.arange(epochs * rows.per_epoch))["tokens"]
        assert len(drawn) >= len(expected)
        assert sorted(map(tuple, drawn[: len(expected)])) == sorted(map(tuple, expected))


def test_one_bucket_is_the_plain_loader():
    config = DataConfig(seed=3)
    plain = make_loader(config, DOCUMENTS, ByteTokenizer(), seq_len=8, batch_size=4)
    mixed = loader(buckets=[BucketShape(8, 4)], config=config)
    for one, other in zip(take(plain, 30), take(mixed, 30), strict=True):
        assert other.pop("bucket") == 0
        assert_batches_equal([other], [one])


@given(proportions, st.integers(1, 5), st.integers(0, 3))
def test_draws_are_numbered_without_gaps_and_in_proportion(buckets, block_steps, seed):
    tokens, sizes, groups = zip(*buckets, strict=True)
    if sum(tokens) == 0:
        tokens = (1, *tokens[1:])
    draws = Draws(
        [BucketShape(size, 1, group) for size, group in zip(sizes, groups, strict=True)], tokens, block_steps, seed
    )
    drawn = [draws(n) for n in range(300)]
    for k, share in enumerate(np.divide(tokens, sizes)):
        mine = [index for bucket, index in drawn if bucket == k]
        assert mine == list(range(len(mine)))
        expected = 300 * share / np.divide(tokens, sizes).sum()
        # Off by blocks that jitter has moved in this epoch, and by what epochs before have left over.
        assert abs(len(mine) - expected) <= 2 * len(tokens) * block_steps + 1


def test_draws_come_in_blocks_of_a_group():
    shapes, tokens = [BucketShape(1, 1, 0), BucketShape(1, 1, 1), BucketShape(1, 1, 1)], [400, 100, 300]
    changes = {}
    for block_steps in (1, 10):
        draws = Draws(shapes, tokens, block_steps, seed=0)
        groups = [shapes[draws(n)[0]].group for n in range(800)]
        changes[block_steps] = sum(a != b for a, b in itertools.pairwise(groups))
        in_parts = np.reshape([draws(n)[0] for n in range(800)], (4, 200))
        for part in in_parts:
            assert np.abs(np.bincount(part, minlength=3) - np.divide(tokens, 4)).max() <= 2 * block_steps
    assert changes[1] > 300
    assert changes[10] <= 80


def test_the_seed_decides():
    other = DataConfig(seed=4, block_steps=2)
    same, different = take(loader(), 30), take(loader(config=other), 30)
    assert [b["bucket"] for b in same] == [b["bucket"] for b in take(loader(), 30)]
    assert [b["bucket"] for b in same] != [b["bucket"] for b in different]


@settings(max_examples=10)
@given(st.integers(0, 60), st.integers(0, 5))
def test_resumed_is_uninterrupted(cut, ahead):
    whole = take(loader(), cut + 6)
    iterator = loader()
    take(iterator, cut)
    state = iterator.get_state()
    take(iterator, ahead)
    for again in (iterator, loader()):
        again.set_state(state)
        for one, other in zip(take(again, 6), whole[cut:], strict=True):
            assert one["bucket"] == other["bucket"]
            np.testing.assert_array_equal(one["targets"], other["targets"])


def test_a_bucket_without_documents_is_named_and_never_drawn(caplog):
    short = [document for document in DOCUMENTS if len(document.text) < 8]
    with caplog.at_level(logging.WARNING):
        batches = take(loader(short), 30)
    assert {batch["bucket"] for batch in batches} == {0, 1}
    assert [r.getMessage() for r in caplog.records] == [
        "no document suits rows of 16 tokens; that bucket is never drawn"
    ]


def test_errors():
    with pytest.raises(ConfigError, match=r"seq_len=\[8, 4\], which must ascend"):
        loader(buckets=[BucketShape(8, 1), BucketShape(4, 1)])
    with pytest.raises(ConfigError, match="documents hold 0 tokens; at least 2 are needed"):
        loader([])
