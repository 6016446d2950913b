"""Text comes back from ids exactly, and every id's bytes are counted."""

import hashlib
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from moejax.checks import ConfigError
from moejax.config import DataConfig
from moejax.data import BpeTokenizer, ByteTokenizer, Document, load_data, make_tokenizer, tokenizer_vocab_size
from moejax.data import tokenizer as tokenizer_module
from moejax.data.loader import encode_documents

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

    def test_default_cache_honors_the_environment(self, tmp_path, monkeypatch):
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

    @pytest.mark.parametrize("name", ["file", 300 * "x"])
    def test_without_a_cache_it_still_works(self, tmp_path, caplog, name):
        (tmp_path / "file").write_text("")
        assert make_tokenizer(BPE, CORPUS, tmp_path / name).vocab_size == 275
        assert "the tokenizer is not cached: cannot write" in caplog.text


class TestFromFile:
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
                rf"^tokenizer='.*t\.json' cannot be read \({reason}\); use 'bytes', 'bpe', or the path of"
            )
            assert "\n" not in str(error.value)

    def test_error_of_what_is_no_file(self):
        with pytest.raises(ConfigError, match=r"^tokenizer='/dev/zero' cannot be read \(not a regular file\); use"):
            make_tokenizer(DataConfig(tokenizer="/dev/zero"), CORPUS)

    def test_error_of_lossy_tokenizer(self, bpe):
        lossy = tokenizers.Tokenizer.from_str(bpe._tokenizer.to_str())
        lossy.normalizer = normalizers.Lowercase()
        with pytest.raises(ConfigError, match=r"tokenizer='x' gives 'naïve .* use one that gives every text back"):
            BpeTokenizer(lossy, "x")


def byte_level(*special, leading=None, ordinary=()):
    """GPT-2's kind: 256 bytes, then `ordinary` and `special` tokens; `leading` is put before a text on request."""
    vocab = {token: i for i, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), *ordinary])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if leading:
        template = processors.TemplateProcessing(
            f"{leading} $A", special_tokens=[(leading, tokenizer.token_to_id(leading))]
        )
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


LLAMA_3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"]
MINIMAX = ["<filename>", "]~!b[", "[e~["]
QWEN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OWN = ["<start>", "<stop>"]


class TestSeparator:
    """Documents are led by the token that the model's own tokenizer puts there."""

    @pytest.mark.parametrize(
        ("special", "config", "expected"),
        [
            (LLAMA_3, {"bos_token": LLAMA_3[0], "eos_token": LLAMA_3[1]}, LLAMA_3[0]),
            (DEEPSEEK, {"bos_token": {"content": DEEPSEEK[0], "lstrip": False}, "eos_token": None}, DEEPSEEK[0]),
            (MINIMAX, {"bos_token": MINIMAX[1], "eos_token": MINIMAX[2]}, MINIMAX[1]),
            (QWEN, {"bos_token": None, "eos_token": "<|im_end|>"}, "<|im_end|>"),
            (QWEN, {"bos_token": "not there", "eos_token": "<|endoftext|>"}, "<|endoftext|>"),
            (OWN, {"bos_token": OWN[0], "eos_token": OWN[1]}, OWN[0]),
            (OWN, {"add_bos_token": False, "bos_token": OWN[0], "eos_token": OWN[1]}, OWN[1]),
            (OWN, {"add_bos_token": True, "bos_token": OWN[0], "eos_token": OWN[1]}, OWN[0]),
        ],
    )
    @pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
    @pytest.mark.parametrize("by_folder", [False, True])
    def test_it_is_what_the_models_files_say(self, tmp_path, special, config, expected, file, by_folder):
        if "add_bos_token" in config and file != "tokenizer_config.json":
            config = {"bos_token": expected}
        byte_level(*special).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / file).write_text(json.dumps(config))
        path = tmp_path if by_folder else tmp_path / "tokenizer.json"
        tokenizer = make_tokenizer(DataConfig(tokenizer=str(path)), CORPUS)
        assert tokenizer._tokenizer.id_to_token(tokenizer.separator) == expected

    @pytest.mark.parametrize(
        ("tokenizer", "expected"),
        [
            (sentencepiece_like(), "<s>"),
            (byte_level(*LLAMA_3), LLAMA_3[0]),
            (byte_level(*DEEPSEEK), DEEPSEEK[0]),
            (byte_level(*MINIMAX), MINIMAX[1]),
            (byte_level(*QWEN), "<|endoftext|>"),
            (byte_level(*LLAMA_3[1:]), LLAMA_3[1]),
            (byte_level("<unk>", "<s>", "</s>"), "<s>"),
            (byte_level("<unk>", "</s>"), "</s>"),
            (byte_level(*OWN, "<|endoftext|>", leading=OWN[0]), OWN[0]),
        ],
    )
    def test_without_files_it_is_what_the_tokenizer_adds_or_a_known_name(self, tokenizer, expected):
        assert tokenizer.id_to_token(BpeTokenizer(tokenizer).separator) == expected

    def test_a_field_overrides_it_and_counts_in_the_fingerprint(self, tmp_path):
        byte_level(*OWN).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": OWN[0]}))
        made = [
            make_tokenizer(DataConfig(tokenizer=str(tmp_path), separator=separator), CORPUS) for separator in ("", *OWN)
        ]
        assert [tokenizer.separator - 256 for tokenizer in made] == [0, 0, 1]
        assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint

    @pytest.mark.parametrize("ordinary", [False, True])
    def test_it_never_shows_in_text(self, ordinary):
        """Whether the file calls the token special or not."""
        inner = byte_level(ordinary=["<s>"]) if ordinary else byte_level("<s>")
        tokenizer = BpeTokenizer(inner)
        ids = [tokenizer.separator, *tokenizer.encode("a<s>b")]
        assert ids.count(tokenizer.separator) == 1
        assert tokenizer.decode(ids) == "a<s>b"
        assert tokenizer.num_bytes(ids) == 5

    def test_fingerprints_of_earlier_runs_hold(self):
        """They are a hash of the file alone, for separators that were already these."""
        for special in (["<|endoftext|>", "</s>"], ["<unk>", "</s>"], ["<s>"]):
            tokenizer = byte_level(*special)
            text = tokenizer.to_str()
            assert BpeTokenizer(tokenizer).fingerprint == hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def test_documents_begin_with_it(self, tmp_path):
        (tmp_path / "tokenizer").mkdir()
        byte_level(*LLAMA_3).save(str(tmp_path / "tokenizer" / "tokenizer.json"))
        (tmp_path / "a.txt").write_text("one\ntwo\n" * 9)
        config = DataConfig(paths=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path / "tokenizer"))
        data = load_data(config)
        assert data.tokenizer.separator == 256
        assert next(iter(encode_documents(data.train_documents, data.tokenizer)))[0] == 256

    def test_error_of_none(self, tmp_path):
        byte_level(*(f"<{i}>" for i in range(22))).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ConfigError) as error:
            make_tokenizer(DataConfig(tokenizer=str(tmp_path)), CORPUS)
        assert error.match(
            r"does not say which token separates documents; set data\.separator to it: its special tokens are "
            r"<0>, <1>, .*, <19> and 2 more$"
        )
        with pytest.raises(ConfigError, match=r"tokenizer='x' does not say .*: it has no special tokens$"):
            BpeTokenizer(byte_level(), "x")

    @pytest.mark.parametrize(
        ("wanted", "message"),
        [
            ("<no>", r"separator='<no>' is not a token of tokenizer='x'; its special tokens are <start>, <stop>$"),
            ("a", r"separator='a' of tokenizer='x' also stands for text, so it cannot separate documents; set"),
        ],
    )
    def test_error_of_a_wrong_one(self, wanted, message):
        with pytest.raises(ConfigError, match=message):
            BpeTokenizer(byte_level(*OWN), "x", separator=wanted)

    def test_error_of_a_broken_file(self, tmp_path):
        byte_level(*OWN).save(str(tmp_path / "tokenizer.json"))
        (tmp_path / "tokenizer_config.json").write_text("{")
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json, which describes .* cannot be read \(Expecting"):
            make_tokenizer(DataConfig(tokenizer=str(tmp_path)), CORPUS)


class TestVocabSize:
    def test_it_is_known_without_text(self, tmp_path):
        byte_level(*LLAMA_3[:2]).save(str(tmp_path / "tokenizer.json"))
        assert tokenizer_vocab_size(DataConfig()) == 256
        assert tokenizer_vocab_size(DataConfig(tokenizer="bpe", tokenizer_vocab_size=300)) == 300
        for path in (tmp_path, tmp_path / "tokenizer.json"):
            config = DataConfig(tokenizer=str(path))
            assert tokenizer_vocab_size(config) == make_tokenizer(config, CORPUS).vocab_size == 258

    def test_error_of_a_missing_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read \(No such file or directory\); use 'bytes', 'bpe', or"):
            tokenizer_vocab_size(DataConfig(tokenizer=str(tmp_path)))

    @pytest.mark.parametrize("read", [tokenizer_vocab_size, lambda config: make_tokenizer(config, CORPUS)])
    @pytest.mark.parametrize(
        ("model", "reason"),
        [
            (models.WordLevel({"<s>": 0, "b": 1}, unk_token="[UNK]"), r"Missing \[UNK\] token from the vocabulary"),
            (models.WordPiece({"<s>": 0, "b": 1}, unk_token="[UNK]"), r"Missing \[UNK\] token from the vocabulary"),
            (models.Unigram([("<s>", -1.0), ("b", -2.0)]), "unknown token but `unk_id` is missing"),
            (models.BPE(), "its vocabulary is empty"),
        ],
    )
    def test_error_of_one_that_cannot_encode(self, model, reason, read, tmp_path):
        tokenizers.Tokenizer(model).save(str(tmp_path / "tokenizer.json"))
        with pytest.raises(ConfigError, match=rf"^tokenizer='.*' cannot be read \(.*{reason}\); use 'bytes', "):
            read(DataConfig(tokenizer=str(tmp_path)))
