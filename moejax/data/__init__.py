"""Text, tokenizers and the resumable stream of batches."""

from moejax.data.corpora import Document, load_corpus, split_documents

__all__ = ["Document", "load_corpus", "split_documents"]
