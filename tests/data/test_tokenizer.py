"""Text comes back from ids exactly, and every id's bytes are counted."""

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moejax.config import ConfigError, DataConfig
from moejax.data import BpeTokenizer, ByteTokenizer, Document, make_tokenizer
from moejax.data import tokenizer as tokenizer_module

CORPUS = [Document("a", "the cat sat on the mat\n" * 20), Document("b", "def the(cat):\n    return cat\n" * 20)]
BPE = DataConfig(tokenizer="bpe", tokenizer_vocab_size=275)


def sentencepiece_like():
    """Llama's kind: a space before every text, spaces as ▁, bytes where the vocabulary ends."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{i:02X}>": 3 + i for i in range(256)}}
    vocab |= {token: len(vocab) + i for i, token in enumerate(["▁", "c", "a", "é", "ca", "▁ca"])}
    merges = [("c", "a"), ("▁", "ca")]
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=4)
    return tokenizer


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return make_tokenizer(BPE, CORPUS, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def from_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "tokenizer.json"
    sentencepiece_like().save(str(path))
    return make_tokenizer(DataConfig(tokenizer=str(path)), CORPUS)


@pytest.fixture(scope="module", params=["bytes", "bpe", "file"])
def tokenizer(request, bpe, from_file):
    return {"bytes": ByteTokenizer(), "bpe": bpe, "file": from_file}[request.param]


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.text(
    "the cat\n<|endoftext|></s>"
)


class TestEveryTokenizer:
    @given(text=texts)
    def test_text_comes_back(self, tokenizer, text):
        assert tokenizer.decode(tokenizer.encode(text)) == text

    @given(text=texts)
    def test_text_holds_no_separator(self, tokenizer, text):
        ids = tokenizer.encode(text)
        assert tokenizer.separator not in ids
        assert ids.size == 0 or 0 <= ids.min() <= ids.max() < tokenizer.vocab_size

    @given(text=texts)
    def test_bytes_are_counted_exactly(self, tokenizer, text):
        ids = tokenizer.encode(text)
        space = len(tokenizer.encode("")) if not text else tokenizer.num_bytes(tokenizer.encode("c")) - 1
        assert tokenizer.num_bytes(ids) == len(text.encode()) + space
        for cut in range(len(ids)):
            assert tokenizer.num_bytes(ids[:cut]) + tokenizer.num_bytes(ids[cut:]) == tokenizer.num_bytes(ids)

    def test_separator_stands_for_no_text(self, tokenizer):
        ids = [tokenizer.separator, *tokenizer.encode("cat"), tokenizer.separator]
        assert tokenizer.decode(ids) == tokenizer.decode(np.array(ids)) == "cat"
        assert tokenizer.num_bytes(ids) == tokenizer.num_bytes(ids[1:-1])
        assert tokenizer.num_bytes(np.full((2, 3), tokenizer.separator)) == 0

    def test_batch_is_one_by_one(self, tokenizer):
        texts = ["the cat", "", "東京", "<|endoftext|>"]
        for ids, text in zip(tokenizer.encode_batch(texts), texts, strict=True):
            np.testing.assert_array_equal(ids, tokenizer.encode(text))
            assert ids.dtype == np.uint16

    def test_truncated_character_is_replaced(self, tokenizer):
        ids = tokenizer.encode("c東")
        assert tokenizer.decode(ids[:-1]).startswith("c\N{REPLACEMENT CHARACTER}")


class TestByteTokenizer:
    def test_ids_are_bytes(self):
        np.testing.assert_array_equal(ByteTokenizer().encode("aé"), [97, 195, 169])

    def test_error_of_nul(self):
        with pytest.raises(ConfigError, match="text has a NUL at character 1, which is the separator of documents"):
            ByteTokenizer().encode("a\0")


class TestBpe:
    def test_learns_its_corpus(self, bpe):
        assert bpe.vocab_size == 275
        assert bpe.separator == 0
        assert len(bpe.encode("the cat")) < 7

    def test_cached_tokenizer_is_not_trained_again(self, tmp_path, monkeypatch):
        fresh = make_tokenizer(BPE, CORPUS, tmp_path)
        monkeypatch.setattr(tokenizer_module, "_train_bpe", lambda *_: pytest.fail("trained again"))
        cached = make_tokenizer(BPE, CORPUS, tmp_path)
        assert cached.fingerprint == fresh.fingerprint
        np.testing.assert_array_equal(cached.encode(CORPUS[1].text), fresh.encode(CORPUS[1].text))

    def test_cache_holds_one_file_per_corpus_and_size(self, tmp_path):
        fingerprints = {
            make_tokenizer(DataConfig(tokenizer="bpe", tokenizer_vocab_size=size), corpus, tmp_path).fingerprint
            for size in (265, 275)
            for corpus in (CORPUS, CORPUS[:1])
        }
        assert len(fingerprints) == len(list(tmp_path.iterdir())) == 4

    def test_default_cache_honours_the_environment(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        make_tokenizer(BPE, CORPUS)
        assert len(list((tmp_path / "xdg" / "moejax").iterdir())) == 1
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        make_tokenizer(BPE, CORPUS)
        assert len(list((tmp_path / "home" / ".cache" / "moejax").iterdir())) == 1

    def test_broken_cache_is_replaced(self, tmp_path, caplog):
        fresh = make_tokenizer(BPE, CORPUS, tmp_path)
        (path,) = tmp_path.iterdir()
        whole = path.read_text()
        path.write_text(whole[:100])
        assert make_tokenizer(BPE, CORPUS, tmp_path).fingerprint == fresh.fingerprint
        assert path.read_text() == whole
        assert "training the tokenizer again: tokenizer=" in caplog.text

    def test_without_a_cache_it_still_works(self, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        assert make_tokenizer(BPE, CORPUS, tmp_path / "file").vocab_size == 275
        assert "the tokenizer is not cached: cannot write" in caplog.text


class TestFromFile:
    def test_separator_is_what_the_file_has(self, from_file):
        assert from_file.separator == 2

    def test_ids_beyond_16_bits(self):
        vocab = {token: i for i, token in enumerate(pre_tokenizers.ByteLevel.alphabet())}
        vocab |= {f"a{i}": 256 + i for i in range(2**16 - 256)}
        large = tokenizers.Tokenizer(models.BPE(vocab, []))
        large.pre_tokenizer, large.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        large.add_special_tokens(["<|endoftext|>"])
        tokenizer = BpeTokenizer(large)
        assert tokenizer.separator == 2**16
        assert tokenizer.vocab_size == 2**16 + 1
        assert tokenizer.encode("a").dtype == np.int32

    def test_added_token_that_is_not_special_counts_its_bytes(self, bpe):
        inner = tokenizers.Tokenizer.from_str(bpe._tokenizer.to_str())
        inner.add_tokens(["été"])
        tokenizer = BpeTokenizer(inner)
        ids = tokenizer.encode("été")
        assert len(ids) == 1
        assert tokenizer.num_bytes(ids) == 5

    def test_error_of_missing_or_broken_file(self, tmp_path):
        for text, reason in [(None, "No such file or directory"), ("{}", ".+"), ("\0", ".+")]:
            path = tmp_path / "t.json"
            if text is not None:
                path.write_text(text)
            with pytest.raises(ConfigError) as error:
                make_tokenizer(DataConfig(tokenizer=str(path)), CORPUS)
            assert error.match(
                rf"^tokenizer='.*t\.json' cannot be read \({reason}\); use 'bytes', 'bpe' or the path of"
            )
            assert "\n" not in str(error.value)

    def test_error_of_no_separator(self):
        tokenizer = tokenizers.Tokenizer(models.BPE())
        with pytest.raises(
            ConfigError, match=r"tokenizer='x' has no token to separate .* add one of <\|endoftext\|>, "
        ):
            BpeTokenizer(tokenizer, "x")

    def test_error_of_lossy_tokenizer(self, bpe):
        lossy = tokenizers.Tokenizer.from_str(bpe._tokenizer.to_str())
        lossy.normalizer = normalizers.Lowercase()
        with pytest.raises(ConfigError, match=r"tokenizer='x' gives 'naïve .* use one that gives every text back"):
            BpeTokenizer(lossy, "x")
