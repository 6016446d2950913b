"""The work directory of a run: whether it can be written, and the lock that keeps a second run out of it."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, TextIO

import jax

from moejax import strict_json
from moejax.checks import ConfigError, check, expand, make_folder

if sys.platform != "win32":
    import fcntl

LOCK_FILE = "run.lock"
BEAT_SECONDS, STALE_SECONDS = 15.0, 120.0  # how often a run shows that it is alive, and when it counts as gone


def check_folder(path: str | Path, name: str = "") -> Path:
    """Refuses a folder, of the argument `name`, that could not be made or written into; returns it.

    Nothing is made.

    Raises:
      ConfigError: it is a file, or the nearest folder above it that exists takes no files.
    """
    path = expand(path, name)
    argument = f"{name}={path}" if name else path
    try:
        folders = (path, *path.absolute().parents)
        check(
            not any(map(leads_nowhere, folders)), f"{argument} cannot be a folder (a link leads nowhere); give another"
        )
        nearest = next(folder for folder in folders if folder.exists())
        check(nearest.is_dir(), f"{argument} cannot be a folder ({nearest} is a file); give another")
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        cannot = "be written into" if os.path.isdir(path) else "be a folder"
        raise ConfigError(f"{argument} cannot {cannot} ({error.strerror}); give another") from None
    return path


def leads_nowhere(path: Path) -> bool:
    """Returns whether `path` is a link to what does not exist, or to itself."""
    return path.is_symlink() and not path.exists()


class WorkdirLock:
    """Keeps other runs out of a work directory for as long as it is entered; only process 0 of a run takes it.

    The file `run.lock` says which process of which host is in the directory, and since when. The operating system's
    lock on that file dies with the process, so a killed run never has to be cleaned up after. But such a lock may not
    reach the other hosts that share a disk, and some systems have none. So a run also touches its file every
    `BEAT_SECONDS`; where the system's lock says nothing, a file that was not touched for `STALE_SECONDS` is taken over.
    """

    def __init__(self, workdir: str | Path) -> None:
        self.path = Path(workdir) / LOCK_FILE
        self._file: TextIO | None = None
        self._released = threading.Event()

    def check_possible(self) -> None:
        """Raises `ConfigError` if the directory cannot be written, or another run is in it; leaves nothing behind."""
        if jax.process_index() == 0:
            check_folder(self.path.parent, "workdir")
            if self.path.exists():
                self._open().close()

    def __enter__(self) -> WorkdirLock:
        if jax.process_index() == 0:
            make_folder("workdir", self.path.parent)
            file = self._open()
            owner = {"host": platform.node(), "pid": os.getpid(), "started": time.strftime("%Y-%m-%d %H:%M:%S %z")}
            try:
                file.truncate(0)
                os.write(file.fileno(), f"{strict_json.dumps(owner)}\n".encode())
            except OSError as error:  # the disk is full
                file.close()
                raise self._unwritable(error) from None
            self._file = file
            self._released.clear()
            threading.Thread(target=self._beat, name="workdir lock", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._released.set()
            self._file.truncate(0)  # were it removed, two others could each lock a file of this name
            self._file.close()
            self._file = None

    def _open(self) -> TextIO:
        """Returns the file, locked where the system can.

        Raises:
          ConfigError: another run has it, or it cannot be opened.
        """
        try:
            file = self.path.open("a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise self._unwritable(error) from None
        locked = _try_lock(file)
        file.seek(0)
        owner = _read_owner(file.read())
        age = abs(time.time() - os.fstat(file.fileno()).st_mtime)  # clocks differ: a time to come is as far off
        surely_gone = locked and owner is not None and owner["host"] == platform.node()
        if locked is False or (owner is not None and not surely_gone and age < STALE_SECONDS):
            file.close()
            raise ConfigError(self._refusal(owner, age, surely_in_use=locked is False))
        return file

    def _unwritable(self, error: OSError) -> ConfigError:
        why = f"{error.strerror}: {self.path}"
        return ConfigError(f"workdir={self.path.parent} cannot be written to ({why}); make room there, or give another")

    def _refusal(self, owner: dict[str, Any] | None, age: float, *, surely_in_use: bool) -> str:
        who = f"process {owner['pid']} on {owner['host']}, since {owner['started']}" if owner else "another process"
        what = "wait until it has ended"
        if not surely_in_use:
            what = f"if that is gone (its last sign of life was {age:.0f} s ago), delete {self.path}"
        return f"workdir={self.path.parent} is in use by {who}; {what}, or use another workdir"

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # one sign of life less is no reason to end the run
                os.utime(self.path)


def _try_lock(file: TextIO) -> bool | None:
    """Returns whether this process has the lock now; None where the system or the disk has no such locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _read_owner(text: str) -> dict[str, Any] | None:
    """Returns what a run wrote into its file; None if none did, was killed while it wrote, or something else wrote."""
    try:
        owner = json.loads(text)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) and {"host", "pid", "started"} <= owner.keys() else None
