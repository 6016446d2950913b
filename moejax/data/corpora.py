"""Text corpora from what is on this machine: files, folders, globs, or Python's own standard library."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

from moejax.checks import check
from moejax.data.finding import Finder, Found, identify
from moejax.data.formats import NotTextError, read_text

_log = logging.getLogger(__name__)

_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One text file. `name` decides the split, `text` is its exact content: never empty, and without a NUL."""

    name: str
    text: str


def load_corpus(paths: Sequence[str] = (), workdir: str | os.PathLike[str] | None = None) -> list[Document]:
    """Reads every document that `paths` name, in the order of `paths` and by name within each.

    A path is a text file, a folder or a glob (`**` crosses folders), and what exists under exactly this name comes
    before a glob. Folders are read recursively, without hidden files and folders or links to folders; neither does `**`
    follow such links. A file that two names reach is read once, so that it cannot end on both sides of the split. No
    paths means the installed Python's standard library without its tests, about 12 MB.

    A file in a folder or glob that is not plain text (see `moejax.data.formats.read_text`) is passed over, and so is
    all that is in the work directory of a run (`workdir`, and any folder with a `run.json` and `checkpoints`) or in a
    Hugging Face dataset. One log line counts them by reason.

    A document's name is its path from the folder's or glob's own root on: moving a corpus leaves its split as it is.

    Raises:
      ConfigError: a path does not exist or matches nothing; a file or folder that a path names is not plain text or
        cannot be read; the paths together hold no text.
    """
    finder = Finder(workdir)
    found = chain.from_iterable(finder.find(os.fspath(path)) for path in paths) if paths else _find_library(finder)
    documents: list[Document] = []
    read: set[object] = set()
    for name, file, named_itself in found:
        if (identity := identify(file)) in read:
            continue
        try:
            documents.append(Document(name, read_text(file)))
            read.add(identity)
        except NotTextError as error:
            check(not named_itself, f"paths={str(file)!r} {error}")
            finder.pass_over(file, name, error.kind)
    passed_over = finder.describe()
    if passed_over and paths and documents:  # the standard library's empty __init__.py are no news
        _log.warning("text files read: %d; passed over: %s", len(documents), passed_over)
    check(
        bool(documents),
        f"paths={tuple(paths)!r} hold no text; name UTF-8 text files, or folders or globs that have some"
        + (f" (passed over {passed_over})" if passed_over else ""),
    )
    return documents


def split_documents(
    documents: Sequence[Document], eval_fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    """Splits into (train, held out) by a hash of each name, so that a file keeps its side when others come or go.

    `eval_fraction` is the expected share of the files. Neither side is empty: if the hash leaves one so, it gets the
    document nearest to the threshold. Of a single document, the end is held out, from the start of a line if it can.

    Raises:
      ConfigError: there is no document, or only one, of a single character.
    """
    check(len(documents) > 0, "documents=() cannot be split; at least one document is needed")
    if len(documents) == 1:
        return _split_text(documents[0], eval_fraction)
    positions = [_position(document.name) for document in documents]
    # Names alone break no ties between equal ones, hence the index.
    first, *_, last = sorted(range(len(documents)), key=lambda i: (positions[i], i))
    held_out = {i for i, position in enumerate(positions) if position < eval_fraction} | {first}
    held_out.discard(last)
    return (
        tuple(document for i, document in enumerate(documents) if i not in held_out),
        tuple(document for i, document in enumerate(documents) if i in held_out),
    )


def hash_documents(documents: Iterable[Document]) -> str:
    """A hash, 32 hex digits, of the texts and their order: equal corpora tokenize and batch equally."""
    digest = hashlib.blake2b(digest_size=16)
    for document in documents:
        data = document.text.encode()
        digest.update(len(data).to_bytes(8, "little"))  # where a text ends counts too
        digest.update(data)
    return digest.hexdigest()


def _position(name: str) -> float:
    """Where a name falls in [0, 1). Python's own `hash` would fall elsewhere in each process."""
    digest = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


def _split_text(document: Document, eval_fraction: float) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    text = document.text
    check(len(text) > 1, f"document {document.name!r} of {len(text)} character is too short to split; 2 are needed")
    cut = max(1, len(text) - math.ceil(eval_fraction * len(text)))
    line_start = text.rfind("\n", len(text) // 2, cut) + 1
    cut = line_start or cut  # within a line where lines are so long that half the text would go
    return (Document(document.name, text[:cut]),), (Document(document.name, text[cut:]),)


def _find_library(finder: Finder) -> Iterator[Found]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return (Found(name, file) for name, file in finder.walk(root, left_out=_NOT_LIBRARY) if name.endswith(".py"))
