"""Text corpora from what is on this machine: files, folders, globs, or Python's own standard library."""

from __future__ import annotations

import dataclasses
import glob
import hashlib
import logging
import math
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path

from moejax.config import ConfigError, check

_log = logging.getLogger(__name__)

_NOT_LIBRARY = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})


@dataclasses.dataclass(frozen=True)
class Document:
    """One text file. `name` decides the split, `text` is its exact content: never empty, and without a NUL."""

    name: str
    text: str


def load_corpus(paths: Sequence[str] = ()) -> list[Document]:
    """Reads every document that `paths` name, in the order of `paths` and by name within each.

    A path is a text file, a glob (`**` crosses folders) or a folder, which is read recursively, without hidden files
    and folders or links to folders. What is empty or not UTF-8 text is passed over in folders and globs, with one log
    line that counts it. A file that two paths reach is read once, so that it cannot end on both sides of the split. No
    paths means the installed Python's standard library without its tests, about 12 MB.

    A document's name is its path from the folder's or glob's own root on: moving a corpus leaves its split as it is.

    Raises:
      ConfigError: a path does not exist or matches nothing; a file named itself is empty, unreadable or not text; the
        paths together hold no text.
    """
    documents: list[Document] = []
    read: set[Path] = set()
    passed_over: set[Path] = set()
    for name, file, named_itself in _find_all(paths):
        if (resolved := file.resolve()) in read:
            continue
        try:
            documents.append(Document(name, _read_text(file)))
            read.add(resolved)
        except ValueError as error:  # includes UnicodeDecodeError
            check(not named_itself, f"paths={str(file)!r} {error}; name a non-empty UTF-8 text file")
            passed_over.add(resolved)
    if passed_over and paths:  # the standard library's empty __init__.py are no news
        total = len(read) + len(passed_over)
        _log.warning("passed over %d of %d files: empty, unreadable or not UTF-8 text", len(passed_over), total)
    check(
        bool(documents),
        f"paths={tuple(paths)!r} hold no text; name UTF-8 text files, or folders or globs that have some",
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


def _find_all(paths: Sequence[str]) -> Iterator[tuple[str, Path, bool]]:
    """Yields (document name, file, whether a path named exactly this file)."""
    if not paths:
        root = Path(sysconfig.get_paths()["stdlib"])
        for name, file in _walk(root, left_out=_NOT_LIBRARY):
            if name.endswith(".py"):
                yield name, file, False
    for path in paths:
        expanded = Path(path).expanduser()
        if expanded.is_dir():
            for name, file in _walk(expanded):
                yield f"{expanded.resolve().name}/{name}", file, False
        elif expanded.exists():
            yield expanded.name, expanded, True
        elif glob.has_magic(path):
            yield from _find_glob(path)
        else:
            raise ConfigError(f"paths={path!r} does not exist; name a text file, a folder or a glob")


def _walk(root: Path, left_out: Set[str] = frozenset()) -> list[tuple[str, Path]]:
    """(Name relative to `root`, file) by name, without hidden ones and the folders called as in `left_out`."""
    found: list[tuple[str, Path]] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in left_out]
        visible = (Path(folder, name) for name in files if not name.startswith("."))
        found += [(file.relative_to(root).as_posix(), file) for file in visible if file.is_file()]
    return sorted(found)


def _find_glob(path: str) -> Iterator[tuple[str, Path, bool]]:
    pattern = Path(path).expanduser()
    depth = next(i for i, part in enumerate(pattern.parts) if glob.has_magic(part))
    root = Path(*pattern.parts[:depth])
    files = [file for match in sorted(glob.glob(str(pattern), recursive=True)) if (file := Path(match)).is_file()]
    check(bool(files), f"paths={path!r} matches no file; name a text file, a folder or a glob that matches some")
    for file in files:
        yield file.relative_to(root).as_posix(), file, False


def _read_text(file: Path) -> str:
    """The exact text, line ends included; ValueError says why there is none."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    if not data:
        raise ValueError("is empty")
    if b"\0" in data:
        raise ValueError("is binary (it has a NUL byte)")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from error
