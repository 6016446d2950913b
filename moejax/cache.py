"""Files that save the next start some work, in the user's cache folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

from moejax.checks import expand


def cache_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """Returns `folder`, by default `moejax` in the user's cache folder."""
    return Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or expand("~/.cache", "XDG_CACHE_HOME")) / "moejax")


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Has `write` fill the file at `path`, such that a process that starts meanwhile reads a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            write(file)
            file.close()
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise
