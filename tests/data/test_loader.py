"""Rows hold every token once, batches hold shuffled rows, and a resumed loader goes on as if never stopped."""

import logging
from collections import Counter

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moejax.checks import ConfigError
from moejax.config import DataConfig
from moejax.data import ByteTokenizer, Document, load_data, make_loader
from moejax.data.loader import Rows, encode_documents

CONFIG = DataConfig(seed=3)
DOCUMENTS = [Document(str(i), chr(ord("a") + i) * (3 + 7 * i)) for i in range(9)]
FIELDS = ("tokens", "targets", "segment_ids")

document_lists = st.lists(st.text("ab\n"), min_size=1, max_size=6).map(
    lambda texts: [Document(str(i), text + "x") for i, text in enumerate(texts)]
)


def loader(documents=DOCUMENTS, config=CONFIG, **kwargs):
    return make_loader(config, documents, ByteTokenizer(), **{"seq_len": 8, "batch_size": 4} | kwargs)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def assert_batches_equal(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert set(a) == set(b) == set(FIELDS)
        for name in FIELDS:
            np.testing.assert_array_equal(a[name], b[name])


def make_rows(documents, seq_len, seed=None):
    return Rows(encode_documents(documents, ByteTokenizer()), seq_len, 0, seed)


def read(rows, count):
    return {name: value.reshape(-1) for name, value in rows(np.arange(count)).items()}


class TestRows:
    @given(document_lists, st.integers(1, 20), st.integers(0, 5) | st.none())
    def test_every_token_of_an_epoch_is_in_exactly_one_row(self, documents, seq_len, seed):
        """And documents are in one piece. After `seq_len` epochs, rows and epochs end together."""
        num_tokens = sum(len(document.text) + 1 for document in documents)
        copies = -(-(seq_len + 1) // num_tokens)  # an epoch of less than a row's text has several
        epochs = read(make_rows(documents, seq_len, seed), copies * num_tokens)["tokens"].reshape(seq_len, -1)
        for epoch in epochs:
            _, *found = epoch.tobytes().decode("utf-32-le").split("\0")
            assert sorted(found) == sorted([document.text for document in documents] * copies)

    def test_epochs_are_in_different_orders(self):
        num_tokens = sum(len(document.text) + 1 for document in DOCUMENTS)
        rows = make_rows(DOCUMENTS, num_tokens, seed=1)
        orders = {tuple(rows(np.array([i]))["tokens"][0]) for i in range(8)}
        assert len(orders) == 8

    @given(document_lists, st.integers(1, 20))
    def test_targets_are_the_tokens_shifted(self, documents, seq_len):
        stream = read(make_rows(documents, seq_len, seed=0), 30)
        np.testing.assert_array_equal(stream["targets"][:-1], stream["tokens"][1:])

    @given(document_lists, st.integers(1, 20))
    def test_segments_start_at_one_and_change_at_separators_only(self, documents, seq_len):
        batch = make_rows(documents, seq_len, seed=0)(np.arange(10))
        steps = np.diff(batch["segment_ids"], axis=1)
        np.testing.assert_array_equal(batch["segment_ids"][:, 0], 1)
        np.testing.assert_array_equal(steps, batch["tokens"][:, 1:] == 0)

    def test_rows_do_not_depend_on_their_batch(self):
        rows = make_rows(DOCUMENTS, 8, seed=0)
        together = rows(np.array([40, 3, 1000]))
        for i, row in enumerate((40, 3, 1000)):
            assert_batches_equal([rows(np.array([row]))], [{name: together[name][i : i + 1] for name in FIELDS}])


class TestTrain:
    def test_shapes_and_types(self):
        for batch_size, seq_len in ((4, 8), (5, 8), (4, 7)):
            batch = next(loader(batch_size=batch_size, seq_len=seq_len))
            assert {name: (value.shape, value.dtype) for name, value in batch.items()} == dict.fromkeys(
                FIELDS, ((batch_size, seq_len), np.int32)
            )

    def test_rows_are_those_of_the_stream_each_once(self):
        rows = make_rows(DOCUMENTS, 8, seed=CONFIG.seed)
        count = rows.per_epoch
        assert count % 5 == 0  # so that batches of five end with the first window
        expected = rows(np.arange(count))["tokens"]
        batches = take(loader(batch_size=5), count // 5)
        actual = np.concatenate([batch["tokens"] for batch in batches])
        assert not np.array_equal(actual, expected)
        assert sorted(map(tuple, actual)) == sorted(map(tuple, expected))

    def test_pieces_of_a_long_document_are_spread(self):
        long = [Document("long", "".join(chr(97 + i // 8 % 26) for i in range(8 * 26 * 10)))]
        tokens = next(loader(long, batch_size=16))["tokens"]
        assert (np.diff(tokens[:, 1]) == 1).sum() < 8

    def test_seed_decides(self):
        same, other = DataConfig(seed=3), DataConfig(seed=-4)
        assert_batches_equal(take(loader(config=same), 5), take(loader(), 5))
        assert not np.array_equal(next(loader(config=other))["tokens"], next(loader())["tokens"])

    def test_text_shorter_than_a_batch_repeats(self):
        for batch in take(loader([Document("x", "ab")]), 3):
            assert batch["tokens"].shape == (4, 8)
            np.testing.assert_array_equal(np.unique(batch["tokens"]), [0, 97, 98])

    def test_errors(self):
        for name in ("batch_size", "seq_len"):
            with pytest.raises(ConfigError, match=f"{name}=0 must be positive"):
                loader(**{name: 0})
        for documents, count in [([], 0), ([Document("x", "")], 1)]:
            with pytest.raises(ConfigError, match=f"documents hold {count} tokens; at least 2 are needed"):
                loader(documents)


class TestHeldOut:
    def test_one_pass_of_every_row_without_the_remainder(self):
        rows = make_rows(DOCUMENTS, 8)
        batches = list(loader(train=False))
        assert len(batches) == rows.per_epoch // 4
        passed = [tuple(row) for batch in batches for row in batch["tokens"].tolist()]
        every = [tuple(row) for row in rows(np.arange(rows.per_epoch))["tokens"].tolist()]
        assert len(passed) == len(batches) * 4
        assert not Counter(passed) - Counter(every)
        assert passed != every[: len(passed)]  # the first batches are a sample of all, not the beginning

    def test_the_order_is_not_the_seeds(self):
        other = DataConfig(seed=-4)
        assert_batches_equal(list(loader(config=other, train=False)), list(loader(train=False)))

    def test_second_pass(self):
        iterator = loader(train=False)
        state = iterator.get_state()
        first = list(iterator)
        iterator.set_state(state)
        assert_batches_equal(list(iterator), first)

    @pytest.mark.parametrize(("length", "repeated"), [(1, True), (30, True), (31, True), (32, False)])
    def test_text_shorter_than_a_batch_fills_one(self, length, repeated, caplog):
        text = ("abcdefg" * 5)[:length]
        with caplog.at_level(logging.WARNING):
            batches = list(loader([Document("x", text)], train=False))
        assert len(batches) == 1
        rows = [row.tobytes().decode("utf-32-le") for row in batches[0]["tokens"]]
        stream = f"\0{text}" * 40
        assert sorted(rows) == sorted(stream[i : i + 8] for i in range(0, 32, 8))
        assert [record.getMessage() for record in caplog.records] == repeated * [
            f"held-out text of {length + 1} tokens is repeated to fill one batch, which takes 33"
        ]


class TestResume:
    @settings(max_examples=10, deadline=None)
    @given(st.integers(0, 60), st.integers(0, 5), st.booleans())
    def test_resumed_is_uninterrupted(self, cut, ahead, fresh):
        """Wherever it was cut, and whether a new loader or one that is somewhere else takes over."""
        whole = take(loader(), cut + 6)
        iterator = loader()
        take(iterator, cut)
        state = iterator.get_state()
        take(iterator, ahead)
        if fresh:
            iterator = loader()
        iterator.set_state(state)
        assert_batches_equal(take(iterator, 6), whole[cut:])

    def test_through_orbax(self, tmp_path):
        whole = take(loader(), 40)
        iterator = loader()
        take(iterator, 34)
        with ocp.CheckpointManager(tmp_path) as manager:
            manager.save(34, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
            take(iterator, 3)
            manager.wait_until_finished()
            restored = loader()
            manager.restore(34, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(restored)))
        assert_batches_equal(take(restored, 6), whole[34:])


class TestLoadData:
    @pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
    def test_from_a_single_file_to_batches(self, tmp_path, tokenizer):
        (tmp_path / "text").write_text("".join(f"line {i}\n" for i in range(300)))
        config = DataConfig(paths=(str(tmp_path / "text"),), tokenizer=tokenizer)
        data = load_data(config, tmp_path / "cache")
        assert data.train_documents[0].text + data.eval_documents[0].text == (tmp_path / "text").read_text()
        loader = make_loader(config, data.eval_documents, data.tokenizer, seq_len=16, batch_size=2, train=False)
        batch = next(loader)
        assert data.tokenizer.decode(batch["tokens"][0]) in data.eval_documents[0].text
        assert data.fingerprint == load_data(config, tmp_path / "cache").fingerprint

    def test_fingerprint_sees_text_and_tokenizer(self, tmp_path):
        (tmp_path / "text").write_text("one\ntwo\nthree\n" * 30)
        paths = (str(tmp_path / "text"),)
        fingerprints = [load_data(DataConfig(paths=paths, tokenizer=t), tmp_path).fingerprint for t in ("bytes", "bpe")]
        (tmp_path / "text").write_text("one\ntwo\nfour\n" * 30)
        fingerprints.append(load_data(DataConfig(paths=paths)).fingerprint)
        assert len(set(fingerprints)) == 3
