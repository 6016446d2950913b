"""Text, tokenizers and the resumable stream of batches."""

from moejax.data.corpora import Document, load_corpus, split_documents
from moejax.data.tokenizer import BpeTokenizer, ByteTokenizer, Tokenizer, make_tokenizer

__all__ = [
    "BpeTokenizer",
    "ByteTokenizer",
    "Document",
    "Tokenizer",
    "load_corpus",
    "make_tokenizer",
    "split_documents",
]
