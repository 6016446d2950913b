"""Documents as ids: encoded in bounded pieces, and kept on disk for the next start.

Legend: N tokens, D documents.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moejax.cache import cache_folder, write_atomically
from moejax.data.corpora import Document, hash_documents
from moejax.data.pieces import Report, Reporter, cut
from moejax.data.tokenizer import ByteTokenizer, Tokenizer

_log = logging.getLogger(__name__)

_GROUP = 2**19  # characters encoded at once: a tokenizer's bookkeeping takes about a hundred bytes for each
_CONTEXT = 64  # characters before and after a cut that may change the ids next to it
_CACHED_FROM = 2**22  # characters; a smaller corpus is encoded in a second


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The ids of documents one after the other, uint16[N] or int32[N], and each document's length, int64[D].

    Every document is led by the separator. Iterating gives an array of ids per document.
    """

    tokens: np.ndarray
    lengths: np.ndarray

    @classmethod
    def of(cls, documents: Sequence[np.ndarray]) -> Encoded:
        """Joins the ids of `documents`."""
        return cls(np.concatenate([np.empty(0, np.uint16), *documents]), np.array([len(ids) for ids in documents], int))

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[np.ndarray]:
        ends = np.cumsum(self.lengths)
        return (self.tokens[end - length : end] for end, length in zip(ends, self.lengths, strict=True))


def encode_documents(
    documents: Sequence[Document],
    tokenizer: Tokenizer,
    cache_dir: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> Encoded:
    """Returns the ids of `documents`, each led by the separator.

    Long documents are encoded in pieces (see `moejax.data.pieces.cut`). The ids of a corpus of more than about 4 MB are
    kept in `cache_dir` (default: `moejax` in the user's cache folder) by a hash of text and tokenizer, and read from
    there as a memory-mapped file. `report` is called with a line every few seconds.
    """
    num_characters = sum(len(document.text) for document in documents)
    if isinstance(tokenizer, ByteTokenizer) or num_characters < _CACHED_FROM:
        return _encode(documents, tokenizer, num_characters, report)
    text_and_tokenizer = hash_documents((Document("tokenizer", tokenizer.fingerprint), *documents))
    path = cache_folder(cache_dir) / f"ids-{text_and_tokenizer}.npy"
    if os.path.exists(path):  # unlike `Path.exists`, False where the folder may not be entered
        try:
            return _read(path, tokenizer.separator, len(documents))
        except (OSError, EOFError, ValueError) as error:
            _log.warning("encoding the text again: %s cannot be used (%s)", path, error)
    encoded = _encode(documents, tokenizer, num_characters, report)
    try:
        write_atomically(path, lambda file: np.save(file, encoded.tokens))
    except OSError as error:  # the next run encodes again: slower, not wrong
        _log.warning("the encoded text is not cached: cannot write %s (%s)", path, error.strerror)
    return encoded


def _read(path: Path, separator: int, num_documents: int) -> Encoded:
    tokens = np.load(path, mmap_mode="r")
    starts = np.flatnonzero(tokens == separator)
    if len(starts) != num_documents:
        raise ValueError(f"it holds {len(starts)} documents, not {num_documents}")
    return Encoded(tokens, np.diff(starts, append=len(tokens)))


class _Piece(NamedTuple):
    """A part of a document, and the text before it that is encoded with it to `num_before` ids of its own."""

    document: int
    text: str
    before: str
    num_before: int


def _encode(documents: Sequence[Document], tokenizer: Tokenizer, num_characters: int, report: Report | None) -> Encoded:
    reporter = Reporter(report, "encoding", num_characters)
    ids: list[np.ndarray] = []
    lengths = np.zeros(len(documents), np.int64)
    pieces = (piece for i, document in enumerate(documents) for piece in _pieces(i, document.text, tokenizer))
    for group in _grouped(pieces):
        encoded = tokenizer.encode_batch([piece.before + piece.text for piece in group])
        for piece, its_ids in zip(group, encoded, strict=True):
            if not lengths[piece.document]:
                ids.append(np.array([tokenizer.separator], its_ids.dtype))
                lengths[piece.document] = 1
            ids.append(its_ids[piece.num_before :])
            lengths[piece.document] += len(ids[-1])
        reporter.add(sum(len(piece.text) for piece in group))
    return Encoded(Encoded.of(ids).tokens, lengths)


def _pieces(number: int, text: str, tokenizer: Tokenizer) -> Iterator[_Piece]:
    """Yields the pieces of document `number`."""
    for start, end in cut(text, lambda place: _context(text, place, tokenizer) is not None):
        before = _context(text, start, tokenizer) if start else None
        yield _Piece(number, text[start:end], *(before or ("", 0)))


def _context(text: str, place: int, tokenizer: Tokenizer) -> tuple[str, int] | None:
    """Returns the text just before `place` and how many ids it has; None if the text after `place` changes them."""
    before = text[max(0, place - _CONTEXT) : place]
    ids, ids_across = tokenizer.encode_batch([before, before + text[place : place + _CONTEXT]])
    return (before, len(ids)) if np.array_equal(ids, ids_across[: len(ids)]) else None


def _grouped(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Yields the pieces in lists of about `_GROUP` characters."""
    group: list[_Piece] = []
    size = 0
    for piece in pieces:
        group.append(piece)
        size += len(piece.before) + len(piece.text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
