"""Where scripts write: a file or folder that could not be written in the end is refused before the work."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path
from typing import Any

from absl import flags

from moejax import plots
from moejax.checks import ConfigError, check, expand
from moejax.train.workdir import check_folder, leads_nowhere


class OutputParser(flags.ArgumentParser[Path]):
    """Reads the value of a flag for a file or folder to write, and refuses what could not be written in the end."""

    def __init__(self, suffixes: tuple[str, ...], folder: bool) -> None:
        self._suffixes, self._folder = suffixes, folder

    def parse(self, argument: str) -> Path:
        check(bool(argument), f" needs the name of a {'folder' if self._folder else 'file'}")
        path = expand(argument)
        return check_folder(path) if self._folder else check_output(path, *self._suffixes)


def check_output(path: Path, *suffixes: str) -> Path:
    """Refuses a file that could not be written at the end of the work; returns it, and leaves nothing behind.

    Raises:
      ConfigError: it is a folder or a device, its folder does not exist or takes no files, or its suffix is not one of
        `suffixes`; or it is a picture, and matplotlib is missing.
    """
    check(not suffixes or path.suffix in suffixes, f"{path} must end in {', '.join(suffixes)}")
    try:
        check(not leads_nowhere(path), f"{path} is a link that leads nowhere; give another file")
        check(not path.is_dir(), f"{path} is a folder; give a file")
        regular = path.is_file() or not path.exists() or str(path) in ("/dev/null", "/dev/stdout")
        check(regular, f"{path} is not a regular file; give a file")
        check(path.parent.is_dir(), f"{path} is in a folder that does not exist; make {path.parent} first")
        if not path.exists():
            tempfile.TemporaryFile(dir=path.parent).close()
        elif not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written ({error.strerror}); give another file") from None
    if suffixes == plots.SUFFIXES:
        plots.check_installed(path)
    return path


def identity(path: Path) -> Any:
    """Returns what two spellings of a file have in common."""
    if not path.exists():
        return path.resolve()
    status = path.stat()
    return status.st_dev, status.st_ino
