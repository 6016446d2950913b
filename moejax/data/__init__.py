"""Text, tokenizers and the resumable stream of batches."""

from __future__ import annotations

import dataclasses
import functools
import os

import grain

from moejax.config import DataConfig
from moejax.data.buckets import BucketShape, make_bucketed_loader
from moejax.data.corpora import Document, hash_documents, load_corpus, split_documents
from moejax.data.loader import make_loader
from moejax.data.pieces import Report
from moejax.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, make_tokenizer, tokenizer_vocab_size

__all__ = [
    "BpeTokenizer",
    "BucketShape",
    "ByteTokenizer",
    "Data",
    "Document",
    "Tokenizer",
    "load_corpus",
    "load_data",
    "make_bucketed_loader",
    "make_loader",
    "make_tokenizer",
    "split_documents",
    "tokenizer_vocab_size",
]


@dataclasses.dataclass(frozen=True)
class Data:
    """What `load_data` has read: a tokenizer and the two sides of the split, neither of them empty."""

    config: DataConfig
    tokenizer: Tokenizer
    train_documents: tuple[Document, ...]
    eval_documents: tuple[Document, ...]

    def batches(
        self, *, seq_len: int, batch_size: int, train: bool = True, report: Report | None = None
    ) -> grain.DatasetIterator:
        """Returns an iterator over batches of the text to train on, or else of the held-out text; see `make_loader`."""
        documents = self.train_documents if train else self.eval_documents
        return make_loader(
            self.config, documents, self.tokenizer,
            seq_len=seq_len, batch_size=batch_size, train=train, report=report,
        )  # fmt: skip

    @functools.cached_property  # hashes all of the text, and every checkpoint holds it
    def fingerprint(self) -> str:
        """32 hex digits that differ where a loader's state would mean other batches: other text or other ids."""
        tokenizer = Document("tokenizer", self.tokenizer.fingerprint)
        return hash_documents((tokenizer, *self.train_documents))


def load_data(
    config: DataConfig,
    cache_dir: str | os.PathLike[str] | None = None,
    workdir: str | os.PathLike[str] | None = None,
    report: Report | None = None,
) -> Data:
    """Reads `config.paths`, splits the documents and makes the tokenizer, from those to train on alone.

    `workdir` is the run's own work directory, which `load_corpus` leaves out; `cache_dir` and `report` are those of
    `make_tokenizer`.

    Raises:
      ConfigError: as `load_corpus`, `split_documents` and `make_tokenizer`.
    """
    train_documents, eval_documents = split_documents(load_corpus(config.paths, workdir), config.eval_fraction)
    tokenizer = make_tokenizer(config, train_documents, cache_dir, report)
    return Data(config, tokenizer, train_documents, eval_documents)
