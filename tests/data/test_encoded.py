"""Long documents are encoded in bounded pieces to the ids of the whole, which are kept for the next start."""

import errno
import os

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_tokenizer import byte_level, sentencepiece_like
from tokenizers import Regex, pre_tokenizers

from moejax.config import DataConfig
from moejax.data import (
    BpeTokenizer,
    BucketShape,
    ByteTokenizer,
    Document,
    encoded,
    load_data,
    make_bucketed_loader,
    make_loader,
    make_tokenizer,
    pieces,
)
from moejax.data import tokenizer as tokenizer_module
from moejax.data.encoded import encode_documents
from moejax.data.pieces import cut

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat,",
    "isn't",
    "it?",
    "",
    "12345",
    "東京",
    "tōkyō",
    "(x)",
    "==",
    "[1]:",
    "caca",
    "ca",
]
CORPUS = [Document(str(i), "\n".join(" ".join(WORDS[i % 5 :]) for _ in range(40)) + "\n") for i in range(8)]
LIMIT = 50

words = st.sampled_from([word for word in WORDS if word])
gaps = st.sampled_from([" ", "\n", "\n\n\n", "  ", "\n    ", ".\n", "\r\n"])
texts = st.lists(st.tuples(words, gaps), max_size=60).map(lambda parts: "".join(map("".join, parts)))


def llama_3_like():
    """Splits words as Llama-3 does: punctuation takes line ends along, digits go by threes."""
    inner = byte_level("<|endoftext|>")
    pattern = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return BpeTokenizer(inner)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return make_tokenizer(DataConfig(tokenizer="bpe", tokenizer_vocab_size=400), CORPUS, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module", params=["bytes", "bpe", "sentencepiece", "llama-3"])
def tokenizer(request, bpe):
    makers = {"bytes": ByteTokenizer, "bpe": lambda: bpe, "llama-3": llama_3_like}
    return makers.get(request.param, lambda: BpeTokenizer(sentencepiece_like()))()


@pytest.fixture(autouse=True, scope="module")
def few_words():
    """Pieces and groups are of a few words."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(pieces, "PIECE", LIMIT)
        monkeypatch.setattr(encoded, "_GROUP", 3 * LIMIT)
        yield


class Recording:
    """A tokenizer that remembers how long the texts were that it got, together and each."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.separator, self.fingerprint = tokenizer.separator, tokenizer.fingerprint
        self.sizes, self.lengths = [], []

    def encode_batch(self, texts):
        self.sizes.append(sum(map(len, texts)))
        self.lengths += map(len, texts)
        return self._tokenizer.encode_batch(texts)


def whole(documents, tokenizer):
    return [[tokenizer.separator, *tokenizer.encode(document.text)] for document in documents]


def encode(documents, tokenizer, **kwargs):
    return [ids.tolist() for ids in encode_documents(documents, tokenizer, **kwargs)]


class TestPieces:
    @given(st.text(" \nab東", max_size=400))
    def test_pieces_make_up_the_text_and_are_bounded(self, text):
        spans = list(cut(text))
        assert "".join(text[start:end] for start, end in spans) == text
        assert all(end - start <= LIMIT for start, end in spans)

    def test_a_line_end_is_best_and_then_a_space(self):
        for text, ends in [
            ("a" * 30 + "\n" + "b b" * 9, 31),
            ("a" * 30 + " b" + "c" * 30 + "\n ", 30),
            ("a" * 30 + "\n\n" + "b" * 30, LIMIT),
            ("a" * 100, LIMIT),
        ]:
            assert next(cut(text)) == (0, ends)

    @pytest.mark.parametrize(
        ("refused", "end"), [([], 33), ([33], 30), ([33, 30], LIMIT), ([33, 30, LIMIT], LIMIT - 1), (range(99), LIMIT)]
    )
    def test_a_place_that_does_not_fit_is_not_taken(self, refused, end):
        text = "a" * 30 + " b\n" + "c" * 30
        assert next(cut(text, lambda place: place not in refused)) == (0, end)


class TestEncode:
    @given(text=texts)
    @example(text="the cat isn't\n" * 30)
    def test_ids_are_those_of_the_whole(self, tokenizer, text):
        documents = [Document("a", text), Document("b", ""), Document("c", text[::-1].strip() or "x")]
        assert encode(documents, tokenizer) == whole(documents, tokenizer)

    @pytest.mark.parametrize("text", ["ab" * 300, "東京" * 200, "    " * 80, "1234567" * 40])
    def test_text_without_a_place_to_cut_still_comes_back(self, tokenizer, text):
        (ids,) = encode_documents([Document("a", text)], tokenizer)
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")
        assert len(ids) > 1

    def test_a_tokenizer_never_gets_more_than_a_piece_and_a_group(self, bpe):
        recording = Recording(bpe)
        documents = [
            *CORPUS,
            Document("long", "".join(document.text for document in CORPUS)),
            Document("word", "x" * 999),
        ]
        encode_documents(documents, recording)
        margin = 2 * encoded._CONTEXT
        assert max(recording.lengths) <= LIMIT + margin
        assert max(recording.sizes) <= 3 * LIMIT + LIMIT + margin
        assert len(recording.sizes) > 10


class TestTraining:
    CONFIG = DataConfig(tokenizer="bpe", tokenizer_vocab_size=350)
    LONG = (Document("long", "\n".join(document.text for document in CORPUS)),)

    def test_pieces_teach_what_the_whole_text_would(self, tmp_path, monkeypatch):
        in_pieces = make_tokenizer(self.CONFIG, self.LONG, tmp_path / "pieces")
        monkeypatch.setattr(pieces, "PIECE", 10**9)
        assert make_tokenizer(self.CONFIG, self.LONG, tmp_path / "whole").fingerprint == in_pieces.fingerprint

    def test_training_gets_no_more_than_a_piece_at_a_time(self, tmp_path, monkeypatch):
        lengths = []
        whole = tokenizer_module._reported_pieces
        monkeypatch.setattr(
            tokenizer_module, "_reported_pieces", lambda *args: (lengths.append(len(p)) or p for p in whole(*args))
        )
        make_tokenizer(self.CONFIG, self.LONG, tmp_path)
        assert sum(lengths) == len(self.LONG[0].text)
        assert max(lengths) <= LIMIT


class TestReports:
    def test_nothing_is_said_of_what_is_quick(self, bpe):
        said = []
        encode_documents(CORPUS, bpe, report=said.append)
        assert said == []

    def test_what_takes_long_is_said(self, tmp_path, monkeypatch):
        monkeypatch.setattr(pieces, "_SECONDS_BETWEEN_REPORTS", 0)
        said = []
        tokenizer = make_tokenizer(TestTraining.CONFIG, CORPUS, tmp_path, said.append)
        first, *read, last = said
        assert (first, last) == ("training the tokenizer", "training the tokenizer, learning merges")
        assert read[-1] == "training the tokenizer, text read: 100%"
        said.clear()
        make_loader(DataConfig(), CORPUS, tokenizer, seq_len=8, batch_size=2, report=said.append)
        make_bucketed_loader(DataConfig(), [BucketShape(8, 2)], CORPUS, tokenizer, report=said.append)
        percents = [int(line.removeprefix("encoding ").removesuffix("%")) for line in said]
        half = len(percents) // 2
        assert percents[:half] == percents[half:] == sorted(percents[:half])
        assert percents[-1] == 100

    def test_they_reach_what_load_data_does(self, tmp_path):
        (tmp_path / "a.txt").write_text(CORPUS[0].text)
        said = []
        config = DataConfig(paths=(str(tmp_path / "a.txt"),), tokenizer="bpe", tokenizer_vocab_size=300)
        load_data(config, tmp_path / "cache", report=said.append)
        assert said[0] == "training the tokenizer"


class TestCache:
    @pytest.fixture(autouse=True)
    def _cache_all(self, monkeypatch):
        monkeypatch.setattr(encoded, "_CACHED_FROM", 1)

    def test_ids_are_kept_and_not_made_again(self, tmp_path, bpe):
        first = encode(CORPUS, bpe, cache_dir=tmp_path)
        recording = Recording(bpe)
        again = encode_documents(CORPUS, recording, tmp_path)
        assert recording.lengths == []
        assert isinstance(again.tokens, np.memmap)
        assert [ids.tolist() for ids in again] == first == whole(CORPUS, bpe)

    def test_another_text_or_tokenizer_is_another_file(self, tmp_path, bpe):
        other = BpeTokenizer(sentencepiece_like())
        for documents, tokenizer in [(CORPUS, bpe), (CORPUS[1:], bpe), (CORPUS, other)]:
            assert encode(documents, tokenizer, cache_dir=tmp_path) == whole(documents, tokenizer)
        assert len(list(tmp_path.iterdir())) == 3

    def test_batches_from_the_cache_are_the_same(self, tmp_path, bpe):
        first, again = (
            next(make_loader(DataConfig(), CORPUS, bpe, seq_len=8, batch_size=4, cache_dir=tmp_path)) for _ in range(2)
        )
        np.testing.assert_array_equal(first["tokens"], again["tokens"])

    def test_bytes_and_small_corpora_are_not_kept(self, tmp_path, bpe, monkeypatch):
        encode(CORPUS, ByteTokenizer(), cache_dir=tmp_path)
        monkeypatch.setattr(encoded, "_CACHED_FROM", 10**6)
        encode(CORPUS, bpe, cache_dir=tmp_path)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("broken", ["cut", "garbage", "empty", "other"])
    def test_a_broken_file_is_said_and_replaced(self, tmp_path, bpe, broken, caplog):
        encode(CORPUS, bpe, cache_dir=tmp_path)
        (path,) = tmp_path.iterdir()
        content = path.read_bytes()
        if broken == "other":
            np.save(path, np.arange(7, dtype=np.uint16))
        else:
            path.write_bytes({"cut": content[:-1], "garbage": b"garbage" * 99, "empty": b""}[broken])
        assert encode(CORPUS, bpe, cache_dir=tmp_path) == whole(CORPUS, bpe)
        assert path.read_bytes() == content
        assert f"encoding the text again: {path} cannot be used" in caplog.text

    @pytest.mark.parametrize("name", ["file", 300 * "x"])
    def test_a_folder_that_cannot_be_written_is_said(self, tmp_path, bpe, caplog, name):
        (tmp_path / "file").write_text("")
        assert encode(CORPUS, bpe, cache_dir=tmp_path / name) == whole(CORPUS, bpe)
        assert "the encoded text is not cached: cannot write" in caplog.text

    def test_a_full_disk_leaves_nothing_behind(self, tmp_path, bpe, caplog, monkeypatch):
        def fail(*_):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(np, "save", fail)
        assert encode(CORPUS, bpe, cache_dir=tmp_path) == whole(CORPUS, bpe)
        assert "No space left on device" in caplog.text
        assert list(tmp_path.iterdir()) == []
