"""What tests of training share: a disk that fills up."""

import errno
import os

import pytest


class Disk:
    """Takes `room` bytes more. A write that does not fit is done in part, and the next one fails."""

    def __init__(self):
        self.room = float("inf")
        self._write = os.write

    def write(self, fd, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(fd, data[: int(min(self.room, len(data)))])
        self.room -= written
        return written


@pytest.fixture
def disk(monkeypatch):
    """The disk of everything that is written through `moejax.train.files`."""
    disk = Disk()
    monkeypatch.setattr("moejax.train.files.os.write", disk.write)
    return disk
