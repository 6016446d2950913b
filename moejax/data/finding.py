"""Finds the files that paths name: files, folders and globs, on this machine."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
from collections.abc import Collection, Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import NamedTuple

from moejax.checks import ConfigError, check, expand

_RUN = "work directory of a run"
_DATASET = "Hugging Face dataset folder"
_NAMES_SHOWN = 3  # of the files that are passed over for one reason


class Found(NamedTuple):
    """A file, the name of its document, and whether a path named exactly this file."""

    name: str
    file: Path
    named_itself: bool = False


class Finder:
    """Finds files, and remembers those that are passed over.

    Args:
      workdir: the work directory of the run that asks. A file in it is found only if a path names it, and so is one in
        other runs' work directories: a run would otherwise read its own records when it is started again.
    """

    def __init__(self, workdir: str | os.PathLike[str] | None = None) -> None:
        self._workdir = identify(expand(workdir, "workdir")) if workdir is not None else None
        self._passed_over: dict[object, tuple[str, str]] = {}

    def find(self, path: str) -> Iterator[Found]:
        """Yields the files that `path` names, by name. What exists is taken literally before it is taken as a glob.

        Raises:
          ConfigError: there is none, or the folder is one that is not read.
        """
        check(path != "", "paths='' is empty; name a text file, a folder or a glob")
        literal = _find_literal(path)
        if literal is None:
            check("://" not in path, f"paths={path!r} is not on this machine; download it and name a file or a folder")
            return self._find_glob(path)
        if os.path.isdir(literal):
            self._check_readable(path, literal)
            root = literal.resolve().name
            return (Found(f"{root}/{name}", file) for name, file in self.walk(literal))
        return iter([Found(literal.name, literal, named_itself=True)])

    def walk(self, root: Path, left_out: Set[str] = frozenset()) -> list[tuple[str, Path]]:
        """Returns (name relative to `root`, file) of all files below `root`, by name.

        Hidden files and folders, links to folders and the folders called as in `left_out` are left out.
        """
        found: list[tuple[str, Path]] = []
        for folder, name, entries in self._folders(root, root, left_out):
            files = (entry.name for entry in entries if not _is_folder(entry))
            found += [(name + file, folder / file) for file in files if not file.startswith(".")]
        return sorted(found)

    def pass_over(self, file: Path, name: str, kind: str) -> None:
        """Remembers that `file` is not read because it is of this `kind`; a file that comes twice counts once."""
        self._passed_over.setdefault(identify(file) or file, (kind, name))

    def describe(self) -> str:
        """Returns what was passed over in words, by kind, each with its first few names; "" for nothing."""
        by_kind: dict[str, list[str]] = {}
        for kind, name in self._passed_over.values():
            by_kind.setdefault(kind, []).append(name)
        return ", ".join(f"{len(names)} {kind} ({_first_few(names)})" for kind, names in by_kind.items())

    def _find_glob(self, path: str) -> Iterator[Found]:
        root, pattern = _split_pattern(path)
        if not pattern:
            raise ConfigError(f"paths={path!r} does not exist; name a text file, a folder or a glob")
        *folder_patterns, file_pattern = [*pattern, "*"] if pattern[-1] == "**" else pattern
        known = len(self._passed_over)
        folders: Collection[Path] = [root]
        for part in folder_patterns:
            folders = dict.fromkeys(match for folder in folders for match in self._match_folders(folder, part, root))
        files = {file for folder in folders for file in self._match_files(folder, file_pattern, root)}
        check(
            bool(files) or len(self._passed_over) > known,
            f"paths={path!r} matches no file; name a text file, a folder or a glob that matches some",
        )
        return (Found(file.relative_to(root).as_posix(), file) for file in sorted(files, key=str))

    def _match_folders(self, folder: Path, pattern: str, root: Path) -> Iterable[Path]:
        if pattern == "**":
            return (match for match, *_ in self._folders(folder, root))
        if not glob.has_magic(pattern):
            return [folder / pattern] if os.path.isdir(folder / pattern) else []
        return [folder / e.name for e in self._enter(folder, root) if _is_folder(e) and _matches(e.name, pattern)]

    def _match_files(self, folder: Path, pattern: str, root: Path) -> Iterable[Path]:
        files = (entry.name for entry in self._enter(folder, root) if not _is_folder(entry))
        is_glob = glob.has_magic(pattern)
        return [folder / name for name in files if (_matches(name, pattern) if is_glob else name == pattern)]

    def _folders(
        self, top: Path, root: Path, left_out: Set[str] = frozenset()
    ) -> Iterator[tuple[Path, str, list[os.DirEntry[str]]]]:
        """Yields `top` and the folders below it, each with the beginning of its files' names and what it holds.

        It leaves out hidden folders and does not follow links, which may lead back up.
        """
        stack = [(top, "")]
        while stack:
            folder, name = stack.pop()
            entries = self._enter(folder, root)
            yield folder, name, entries
            for entry in entries:
                wanted = not entry.name.startswith(".") and entry.name not in left_out
                if wanted and entry.is_dir(follow_symlinks=False):
                    stack.append((folder / entry.name, f"{name}{entry.name}/"))

    def _enter(self, folder: Path, root: Path) -> list[os.DirEntry[str]]:
        """Returns what is in `folder`: nothing if that is below `root` and of a kind that is not read."""
        name = folder.relative_to(root).as_posix()
        try:
            entries = _list(folder)
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError:
            self.pass_over(folder, name, "unreadable folder")
            return []
        kind = self._kind(folder, entries) if folder != root else None
        if kind is not None:
            self.pass_over(folder, name, kind)
            return []
        return entries

    def _kind(self, folder: Path, entries: Iterable[os.DirEntry[str]]) -> str | None:
        """Returns what kind of folder that is not read this is, if it is one."""
        names = {entry.name for entry in entries}
        if {"run.json", "checkpoints"} <= names or (self._workdir is not None and identify(folder) == self._workdir):
            return _RUN
        described = {"dataset_info.json", "state.json"} & names
        has_arrow = any(name.endswith(".arrow") for name in names)
        return _DATASET if "dataset_dict.json" in names or len(described) + has_arrow >= 2 else None

    def _check_readable(self, path: str, folder: Path) -> None:
        """Raises `ConfigError` if the folder that `path` names is of a kind that is not read."""
        try:
            kind = self._kind(folder, _list(folder))
        except OSError as error:
            raise _unreadable(path, error) from None
        check(kind != _RUN, f"paths={path!r} is the {_RUN}; name the folder of the text, or use another workdir")
        check(
            kind is None,
            f"paths={path!r} is a {kind}, not plain text; convert it to plain UTF-8 text files, one per document; "
            "reading it directly is not supported yet",
        )


def identify(file: Path) -> tuple[int, int] | None:
    """Returns what is equal for two names of one file, by link or hard link; None if it cannot be known."""
    try:
        status = os.stat(file)
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


def _find_literal(path: str) -> Path | None:
    """Returns the file or folder called `path`, or that with `~` for a home folder, or None if there is neither."""
    for candidate in (path, os.path.expanduser(path)):
        try:
            os.stat(candidate)
        except PermissionError as error:
            raise _unreadable(path, error) from None
        except (OSError, ValueError):  # no such file, or no such name
            continue
        return Path(candidate)
    return None


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"paths={path!r} cannot be read ({error.strerror}); name a text file, a folder or a glob")


def _split_pattern(path: str) -> tuple[Path, Sequence[str]]:
    """Splits a glob into the folder that it is below and its parts from the first one on that is a pattern."""
    for candidate in (path, os.path.expanduser(path)):
        parts = Path(candidate).parts
        literal = next((i for i in range(len(parts)) if not _is_literal(parts[: i + 1])), len(parts))
        root, pattern = Path(*parts[:literal]), parts[literal:]
        if os.path.isdir(root):
            break
    return root, pattern


def _is_literal(parts: Sequence[str]) -> bool:
    """Whether the last of `parts` is a plain name, or exists as it is after the others."""
    return not glob.has_magic(parts[-1]) or os.path.lexists(Path(*parts))


def _list(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return list(entries)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether `entry` is a folder or a link to one. Its own `is_dir` fails on a link to itself."""
    return entry.is_dir(follow_symlinks=False) or (entry.is_symlink() and os.path.isdir(entry.path))


def _matches(name: str, pattern: str) -> bool:
    hidden = name.startswith(".") and not pattern.startswith(".")
    return not hidden and re.match(fnmatch.translate(pattern), name) is not None


def _first_few(names: Sequence[str]) -> str:
    return ", ".join([repr(name) for name in names[:_NAMES_SHOWN]] + ["…"] * (len(names) > _NAMES_SHOWN))
