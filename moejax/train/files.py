"""Reads JSON, and writes files that stay whole when the disk is full or the process is killed.

Every `OSError` from here names the file; Python's own errors of a write do not.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


class AppendOnlyFile:
    """A file that grows by whole records; each is in the kernel when `append` returns."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._size = self._file.tell()

    def append(self, record: bytes) -> None:
        """Appends the record whole, or raises `OSError` and leaves the file as it was."""
        with _naming(self.path):
            try:
                _write_all(self._file.fileno(), record)
            except OSError:
                self._file.truncate(self._size)
                raise
        self._size += len(record)

    def close(self) -> None:
        """Closes the file; harmless when called again."""
        self._file.close()


def read_json(path: pathlib.Path) -> Any:
    """Returns the content of a JSON file, or raises `OSError` or `ValueError`."""
    if path.exists() and not path.is_file():  # reading a pipe or a device might never end
        raise ValueError("not a regular file")
    return json.loads(path.read_text(encoding="utf-8"))


def replace_text(path: pathlib.Path, text: str) -> None:
    """Gives the file this text at once, or raises `OSError` and leaves it as it was.

    Bytes that are no UTF-8, which Python holds as surrogates, are written as they were.
    """
    written = path.with_name(f"{path.name}.tmp")
    try:
        with _naming(path), written.open("wb", buffering=0) as file:
            _write_all(file.fileno(), text.encode(errors="surrogateescape"))
            os.fsync(file.fileno())
        written.replace(path)
    except OSError:
        written.unlink(missing_ok=True)
        raise


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


@contextlib.contextmanager
def _naming(path: pathlib.Path) -> Iterator[None]:
    """Adds the file's name to an `OSError` that has none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
