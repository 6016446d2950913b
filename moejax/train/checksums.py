"""Checksums of a checkpoint's files, in `checksums.json` beside them."""

from __future__ import annotations

import concurrent.futures
import json
import os
import pathlib
import zlib

from moejax import strict_json

CHECKSUMS = "checksums.json"
_MAX_NAMES = 8
# Orbax rewrites these as it commits; nothing here reads them.
_NOT_SUMMED = ("_CHECKPOINT_METADATA", "commit_success.txt")


def write_checksums(directory: pathlib.Path) -> None:
    """Writes `checksums.json` for all files under `directory`; atomic only with the rename of `directory` itself."""
    names = sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file())
    names = [name for name in names if name not in (*_NOT_SUMMED, CHECKSUMS)]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = pool.map(_size_and_crc, (directory / name for name in names))
        files = strict_json.dumps(dict(zip(names, sums, strict=True)), indent=1)
    with (directory / CHECKSUMS).open("w", encoding="utf-8") as file:
        # Its own checksum comes first, so that damage to this file is not blamed on another.
        file.write(f"{zlib.crc32(files.encode()):08x}\n{files}")
        file.flush()
        os.fsync(file.fileno())


def find_damage(directory: pathlib.Path) -> str | None:
    """Says how the files of a checkpoint differ from those that were written; None if they don't."""
    try:
        crc, _, content = (directory / CHECKSUMS).read_bytes().partition(b"\n")
    except OSError as error:
        return f"{CHECKSUMS} cannot be read: {error}"
    if crc != b"%08x" % zlib.crc32(content):
        return f"{CHECKSUMS} has changed"
    files = json.loads(content)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = list(pool.map(lambda name: _file_damage(directory / name, *files[name]), files))
    found = [f"{name} {problem}" for name, problem in zip(files, problems, strict=True) if problem]
    return abridged(found) if found else None


def _file_damage(path: pathlib.Path, size: int, crc: int) -> str | None:
    try:
        actual_size, actual_crc = _size_and_crc(path)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error}"
    if actual_size != size:
        return f"has {actual_size} bytes instead of {size}"
    return None if actual_crc == crc else f"has changed: CRC-32 {actual_crc:08x} instead of {crc:08x}"


def _size_and_crc(path: pathlib.Path) -> tuple[int, int]:
    size, crc = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return size, crc


def abridged(lines: list[str]) -> str:
    """Returns the first few of the lines, and how many more there are."""
    more = len(lines) - _MAX_NAMES
    return ", ".join(lines[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
