"""Works around folders' names that Orbax and tensorstore misread, and around how they report errors."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import pathlib
import re
import sys
import tempfile
import traceback
from collections.abc import Iterator
from typing import Any

from moejax.checks import check

# Orbax looks for the arrays of all processes with a glob pattern that holds the whole path. With a "[" in a folder's
# name it finds none, and calls the checkpoint whole without them; "*" and "?" match the folders of other runs too.
# tensorstore takes "\" for "/", and takes no bytes that aren't UTF-8, which Python holds as surrogates. Orbax makes
# "gs://" of every "gs:/", and takes the root folders below for cloud storage.
_MISREAD = re.compile(r"[*?\[\\\ud800-\udfff]|gs:/|^/(gs|s3|az|hf)/")
_ORBAX = f"{os.sep}orbax{os.sep}"
_UNFINISHED = ".orbax-checkpoint-tmp/"  # in the path of every file that a save writes
_LONGEST = 3_500  # bytes; with the names that Orbax adds, a path must stay below the system's 4,096


@contextlib.contextmanager
def readable_path(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """Gives a path of `directory` that Orbax reads right: its own, or that of a link to it in a temporary folder.

    Raises:
      ConfigError: the temporary folder has such a name too.
    """
    if not _misread(directory):
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="moejax-") as folder:
        link = pathlib.Path(folder) / "checkpoints"
        check(
            not _misread(link),
            f"directory={str(directory)!r} has a name that tensorstore cannot read, and so has TMPDIR="
            f"{tempfile.gettempdir()!r}; use a name without *, ?, [ and \\, or set TMPDIR to such a folder",
        )
        link.symlink_to(directory, target_is_directory=True)
        yield link


def _misread(path: pathlib.Path) -> bool:
    return bool(_MISREAD.search(f"{path}/")) or len(os.fsencode(path)) > _LONGEST


def full_disk_error(directory: pathlib.Path) -> OSError | None:
    """Returns the error if there is no room even for a small file in a new folder.

    Where Orbax cannot make a checkpoint's folder, its threads wait ten minutes for it, and the process for them.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".room-", dir=directory) as folder:
            (pathlib.Path(folder) / "file").write_bytes(bytes(1 << 16))
    except OSError as error:
        return error
    return None


@functools.cache
def drop_repeated_errors() -> None:
    """Drops, from here on, the tracebacks that Orbax's threads print of an error that `wait_until_finished` raises too.

    Most are logged, several times each. Where an array fails, Orbax also closes an event loop that tensorstore still
    answers to; those errors nobody can catch, and some come up only when the garbage is collected.
    """

    def is_news(record: logging.LogRecord) -> bool:
        _, error, source = record.exc_info or (None, None, None)
        from_orbax = any(_ORBAX in frame.f_code.co_filename for frame, _ in traceback.walk_tb(source))
        return not from_orbax and _UNFINISHED not in str(error)

    def print_news(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            unraisablehook(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)
    unraisablehook, sys.unraisablehook = sys.unraisablehook, print_news


def reason(error: BaseException) -> str:
    """Says in a few words why Orbax failed; tensorstore's own message can be 2,000 characters long."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return os.strerror(int(code[1])) if code else f"{error}".partition(" [tensorstore_spec=")[0] or repr(error)
