"""Tells plain text from everything else, by a file's name and by its content."""

from __future__ import annotations

import codecs
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

_HEAD_BYTES = 2**16  # read first, so that a large binary file is not read whole
_CONVERT = "convert it to plain UTF-8 text, one document per file; reading it directly is not supported yet"

_BY_SUFFIX = {
    **dict.fromkeys((".jsonl", ".ndjson", ".jsonlines"), "JSON Lines"),
    **dict.fromkeys((".json", ".ipynb"), "JSON"),
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
    **dict.fromkeys((".arrow", ".feather"), "Arrow"),
    **dict.fromkeys((".array_record", ".arrayrecord", ".riegeli"), "ArrayRecord"),
    **dict.fromkeys((".tfrecord", ".tfrecords"), "TFRecord"),
    **dict.fromkeys((".npy", ".npz"), "NumPy"),
    **dict.fromkeys((".bin", ".idx"), "token ids (as nanoGPT and Megatron write them)"),
    ".tar": "tar",
    ".pdf": "PDF",
}
_COMPRESSED_SUFFIX = {
    **dict.fromkeys((".gz", ".tgz"), "gzip"),
    **dict.fromkeys((".zst", ".zstd"), "zstd"),
    ".bz2": "bzip2",
    ".xz": "xz",
    ".lz4": "lz4",
    ".zip": "zip",
}
_BY_FIRST_BYTES = (  # a longer beginning before a shorter one that it contains
    (b"\x1f\x8b", "gzip-compressed"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed"),
    (b"BZh", "bzip2-compressed"),
    (b"\xfd7zXZ\0", "xz-compressed"),
    (b"\x04\x22\x4d\x18", "lz4-compressed"),
    (b"PK\x03\x04", "zip-compressed"),
    (b"PAR1", "Parquet"),
    (b"ARROW1", "Arrow"),
    (b"\xff\xff\xff\xff", "Arrow"),  # a stream, as Hugging Face's save_to_disk writes it
    (b"\x83\xaf\x70\xd1\x0d\x88\x4a\x3f", "ArrayRecord"),
    (b"\x93NUMPY", "NumPy"),
    (b"MMIDIDX", "token ids (as nanoGPT and Megatron write them)"),
    (b"%PDF-", "PDF"),
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class NotTextError(ValueError):
    """A file that is not plain text. The message follows the file's name; `kind` is a word or two for counting."""

    def __init__(self, kind: str, problem: str, advice: str = "name a non-empty UTF-8 text file") -> None:
        super().__init__(f"{problem}; {advice}")
        self.kind = kind


def read_text(file: Path) -> str:
    """Returns the exact text of `file`, line ends included; only a byte order mark of UTF-8 is dropped.

    A name that ends like a data format's, such as `.json`, `.csv` or `.parquet`, is believed without a look inside. Any
    other file is text unless its content says otherwise: first bytes that belong to a known format, JSON throughout, a
    NUL, or bytes that are not UTF-8.

    Raises:
      NotTextError: the file is something else, empty, or cannot be read.
    """
    _check_format(_format_of_name(file.name))
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe waits for its writer; /dev/zero never ends
            raise NotTextError("not a regular file", "is not a regular file")
        with file.open("rb") as opened:
            _check_head(opened.read(_HEAD_BYTES))
        data = file.read_bytes()
    except OSError as error:
        raise NotTextError("unreadable", f"cannot be read ({error.strerror})") from error
    text = _decode(data.removeprefix(codecs.BOM_UTF8))
    _check_format(_json_format(text))
    return text


def _check_format(name: str | None) -> None:
    if name is not None:
        raise NotTextError(name, f"is {name}, not plain text", _CONVERT)


def _format_of_name(name: str) -> str | None:
    stem, suffix = os.path.splitext(name.lower())
    compressed = _COMPRESSED_SUFFIX.get(suffix)
    if compressed is None:
        return _BY_SUFFIX.get(suffix)
    inner = _BY_SUFFIX.get(os.path.splitext(stem)[1])
    return f"{compressed}-compressed {inner}" if inner else f"{compressed}-compressed"


def _check_head(head: bytes) -> None:
    if not head:
        raise NotTextError("empty", "is empty")
    _check_format(next((name for first, name in _BY_FIRST_BYTES if head.startswith(first)), None))
    _check_no_nul(head)


def _check_no_nul(data: bytes) -> None:
    if b"\0" in data:
        raise NotTextError("binary", "is binary (it has a NUL byte)")


def _decode(data: bytes) -> str:
    if not data:
        raise NotTextError("empty", "is empty")
    _check_no_nul(data)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise NotTextError("not UTF-8", f"is not UTF-8 (byte {error.start})") from error


def _json_format(text: str) -> str | None:
    """Returns which JSON format `text` is in, if its first two lines are objects, or all of it is one value."""
    if not re.match(r'\s*(\{\s*"|\[\s*[\[{"])', text):
        return None
    lines = _lines(text)
    if _is_object(next(lines)) and _is_object(next(lines, "")):
        return "JSON Lines"
    return "JSON" if text.rstrip()[-1] in "}]" and _parse(text) is not None else None


def _lines(text: str) -> Iterator[str]:
    """Yields the lines that are not blank, without splitting all of a long text at once."""
    start = 0
    while start < len(text):
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        if line := text[start:end].strip():
            yield line
        start = end + 1


def _is_object(line: str) -> bool:
    return line.startswith("{") and isinstance(_parse(line), dict)


def _parse(text: str) -> object:
    """Returns the value that `text` is in JSON, or None."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
