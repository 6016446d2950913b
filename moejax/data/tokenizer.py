"""Tokenizers: raw bytes, or byte-pair encoding that is trained on the corpus or read from a file."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.cache import cache_folder, write_atomically
from moejax.checks import ConfigError, check, expand, one_line
from moejax.config import DataConfig
from moejax.data.corpora import Document, hash_documents
from moejax.data.pieces import Report, Reporter, cut
from moejax.data.separators import ENDOFTEXT, find_separator

_log = logging.getLogger(__name__)

_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
_PROBE = "Naïve  café,\n\n\tif x == [1]:  # 東京 🙂\n<|endoftext|></s><s>"

# A fingerprint names the separator unless it is the first of these that the vocabulary has, so that fingerprints of
# runs from when these were the only ones stay as they are.
_UNNAMED = (ENDOFTEXT, "</s>", "<s>")


class Tokenizer(Protocol):
    """What the loader, the loss and sampling ask of a tokenizer.

    `separator` is the id that stands before each document, and nowhere inside one. `fingerprint` is equal exactly for
    tokenizers that give the same ids.
    """

    vocab_size: int
    separator: int
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """The ids of `text`, without a separator: uint16[N], or int32[N] if the vocabulary needs it."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, in parallel where that helps."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of integer ids[N]. Separators give none; a character of which bytes are missing gives U+FFFD."""

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """How many UTF-8 bytes of text the integer ids (of any shape) stand for; a separator for 0."""

    def to_json(self) -> str:
        """The tokenizer as a tokenizer.json, which the `tokenizers` library and transformers read."""


class ByteTokenizer:
    """UTF-8 bytes are the ids. Byte 0, which no text file holds, is the separator."""

    vocab_size = 256
    separator = 0
    fingerprint = "bytes"

    def encode(self, text: str) -> np.ndarray:
        ids = np.frombuffer(text.encode(), np.uint8)
        nul = text.find("\0")
        check(nul < 0, f"text has a NUL at character {nul}, which is the separator of documents; remove it")
        return ids.astype(np.uint16)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return ids[ids != self.separator].astype(np.uint8).tobytes().decode(errors="replace")

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        return int(np.count_nonzero(np.asarray(ids) != self.separator))

    def to_json(self) -> str:
        _, *characters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_of)  # no text has byte 0
        vocabulary = {character: i for i, character in enumerate([ENDOFTEXT, *characters])}
        tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, []))
        tokenizer.add_special_tokens([ENDOFTEXT])
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer.to_str()


class BpeTokenizer:
    """A tokenizer of the `tokenizers` library that gives back the text it was given.

    A special token's name inside a text is encoded as the text that it is. For a tokenizer that puts a space before
    every text (SentencePiece does), that space counts in `num_bytes`.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        name: str = "bpe",
        *,
        separator: str = "",
        folder: Path | None = None,
    ) -> None:
        """Takes `tokenizer`, which errors call `name`; `find_separator` tells what `separator` and `folder` do.

        Raises:
          ConfigError: it has no token to separate documents with, or does not give text back.
        """
        self._tokenizer = tokenizer
        tokenizer.no_truncation()
        tokenizer.no_padding()
        token = find_separator(tokenizer, name, separator, folder)
        fingerprint = hashlib.blake2b(tokenizer.to_str().encode(), digest_size=16)
        if token != next((known for known in _UNNAMED if tokenizer.token_to_id(known) is not None), None):
            fingerprint.update(token.encode())
        self.fingerprint: str = fingerprint.hexdigest()
        tokenizer.add_special_tokens([token])  # where it was an ordinary one, decoding would show it
        tokenizer.encode_special_tokens = True  # or a text that mentions the separator would be cut by it
        self.separator = tokenizer.get_vocab(with_added_tokens=True)[token]
        self.vocab_size: int = _count_ids(tokenizer)
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.int32
        self._bytes_V = self._count_bytes()
        self._check_usable(name, token)

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode(np.asarray(ids, np.int64).tolist(), skip_special_tokens=True)

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        return int(self._bytes_V[np.asarray(ids, np.int64)].sum())

    def to_json(self) -> str:
        return self._tokenizer.to_str()

    def _count_bytes(self) -> np.ndarray:
        """int64[vocab_size]: the UTF-8 bytes that each id stands for."""
        # The decoder tells whether "é" is the byte 0xE9, as byte-level tokenizers write it, or itself.
        byte_level = "ByteLevel" in json.dumps(json.loads(self._tokenizer.to_str())["decoder"])
        bytes_V = np.zeros(self.vocab_size, np.int64)
        for token, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            if byte_level:
                bytes_V[i] = len(token)
            elif _BYTE_TOKEN.fullmatch(token):
                bytes_V[i] = 1
            else:
                bytes_V[i] = len(token.replace("▁", " ").encode())
        for i, added in self._tokenizer.get_added_tokens_decoder().items():
            bytes_V[i] = 0 if added.special else len(added.content.encode())
        bytes_V[self.separator] = 0
        return bytes_V

    def _check_usable(self, name: str, separator: str) -> None:
        check(
            self.separator not in self.encode(separator),
            f"separator={separator!r} of tokenizer={name!r} also stands for text, so it cannot separate documents; "
            "set data.separator to a special token",
        )
        ids = self.encode(_PROBE)
        spaces = self.num_bytes(ids) - len(_PROBE.encode())  # 1 if it puts a space first
        check(
            self.decode(ids) == _PROBE and spaces in (0, 1),
            f"tokenizer={name!r} gives {self.decode(ids)!r} for {_PROBE!r}; use one that gives every text back: "
            "byte-level BPE, or byte fallback without a normalizer",
        )


def _byte_of(character: str) -> int:
    """Returns the byte that a byte-level tokenizer shows as this character: printable ones as themselves (GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return ord(character) if ord(character) < 256 else hidden[ord(character) - 256]


def make_tokenizer(
    config: DataConfig,
    train_documents: Sequence[Document],
    cache_dir: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> Tokenizer:
    """Makes the tokenizer that `config.tokenizer` names.

    "bpe" is trained on `train_documents` once; `cache_dir` (default: `moejax` in the user's cache folder) keeps it by
    a hash of corpus and size. A small corpus may yield fewer ids than `config.tokenizer_vocab_size`. `report` is
    called with a line when training begins and every few seconds.

    Raises:
      ConfigError: the tokenizer's file cannot be read or used.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer()
    if config.tokenizer == "bpe":
        return _cached_bpe(train_documents, config.tokenizer_vocab_size, cache_folder(cache_dir), report)
    tokenizer, folder = _read_named(config.tokenizer)
    return BpeTokenizer(tokenizer, config.tokenizer, separator=config.separator, folder=folder)


def tokenizer_vocab_size(config: DataConfig) -> int:
    """Returns how many ids `config.tokenizer` needs, without reading any text; for "bpe", the most that it may learn.

    Raises:
      ConfigError: the tokenizer's file cannot be read.
    """
    if config.tokenizer == "bytes":
        return ByteTokenizer.vocab_size
    return config.tokenizer_vocab_size if config.tokenizer == "bpe" else _count_ids(_read_named(config.tokenizer)[0])


def _count_ids(tokenizer: tokenizers.Tokenizer) -> int:
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _read_named(name: str) -> tuple[tokenizers.Tokenizer, Path]:
    """Reads the tokenizer.json that `name` is, or that the folder `name` holds; returns it and its folder."""
    reason: str | None = "not a regular file"
    try:
        path = expand(name)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.exists() or path.is_file():  # reading a pipe or a device might never end
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
            tokenizer.encode(_PROBE)  # fails for what it has no token for, where it has no unknown token either
            if tokenizer.get_vocab_size():
                return tokenizer, path.parent
            reason = "its vocabulary is empty"
    except OSError as error:
        reason = error.strerror
    except Exception as error:  # the library raises bare Exception for what it cannot parse or encode
        reason = one_line(error)
    raise ConfigError(
        f"tokenizer={name!r} cannot be read ({reason}); use 'bytes', 'bpe', or the path of a tokenizer.json or of a "
        "folder that has one"
    )


def _cached_bpe(documents: Sequence[Document], vocab_size: int, cache_dir: Path, report: Report | None) -> BpeTokenizer:
    path = cache_dir / f"bpe-{vocab_size}-{hash_documents(documents)}.json"
    if os.path.exists(path):  # unlike `Path.exists`, False where the folder may not be entered
        try:
            return BpeTokenizer(_read_named(str(path))[0], str(path))
        except ConfigError as error:
            _log.warning("training the tokenizer again: %s", error)
    tokenizer = _train_bpe(documents, vocab_size, report)
    try:
        write_atomically(path, lambda file: file.write(tokenizer.to_str().encode()))
    except OSError as error:  # the next run trains again: slower, not wrong
        _log.warning("the tokenizer is not cached: cannot write %s (%s)", path, error.strerror)
    return BpeTokenizer(tokenizer)


def _train_bpe(documents: Sequence[Document], vocab_size: int, report: Report | None) -> tokenizers.Tokenizer:
    """Trains byte-level BPE (GPT-2's): 256 bytes, learned merges, and the separator as id 0."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[ENDOFTEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_reported_pieces(documents, report), trainer)
    return tokenizer


def _reported_pieces(documents: Sequence[Document], report: Report | None) -> Iterator[str]:
    """Yields the documents' texts in bounded pieces: splitting a text into words takes many times its size."""
    if report is not None:
        report("training the tokenizer")
    reporter = Reporter(report, "training the tokenizer, text read:", sum(len(document.text) for document in documents))
    for document in documents:
        for start, end in cut(document.text):
            yield document.text[start:end]
            reporter.add(end - start)
    if report is not None:
        report("training the tokenizer, learning merges")
