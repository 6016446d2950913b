"""Only plain text is read: other formats are known by their names and by their content."""

import array
import bz2
import gzip
import io
import json
import lzma
import os
import socket
import zipfile

import numpy as np
import pytest

from moejax.checks import ConfigError
from moejax.data import load_corpus
from moejax.data.formats import NotTextError, read_text

ROWS = "".join(json.dumps({"text": f"document {i}\n"}) + "\n" for i in range(3))
CONVERT = (
    "not plain text; convert it to plain UTF-8 text, one document per file; reading it directly is not supported yet"
)


def npy():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(zipfile.ZipInfo("a.txt"), "text")  # which has a fixed date
    return buffer.getvalue()


ARRAY_RECORD = bytes.fromhex("83af70d10d884a3f00000000000000004000")
TOKEN_IDS = "token ids (as nanoGPT and Megatron write them)"
CONTENTS = {  # what is in a file -> the format, whatever its name
    "JSON Lines": ROWS.encode(),
    "JSON": json.dumps({"text": ["a", {"b": 1}]}, indent=2).encode(),
    "Parquet": b"PAR1 some columns PAR1",
    "Arrow": b"\xff\xff\xff\xff\x10\x01\x00\x00",
    "ArrayRecord": ARRAY_RECORD,
    "NumPy": npy(),
    TOKEN_IDS: b"MMIDIDX\x00\x00\x01",
    "gzip-compressed": gzip.compress(b"text", mtime=0),
    "zstd-compressed": b"\x28\xb5\x2f\xfd\x04\x58\x21",
    "bzip2-compressed": bz2.compress(b"text"),
    "xz-compressed": lzma.compress(b"text"),
    "zip-compressed": zipped(),
    "PDF": b"%PDF-1.7\n",
    "UTF-16": "text".encode("utf-16"),
    "UTF-32": "text".encode("utf-32"),
}
NAMES = {
    "a.jsonl": "JSON Lines",
    "A.JSONL": "JSON Lines",
    "a.ndjson": "JSON Lines",
    "a.jsonl.gz": "gzip-compressed JSON Lines",
    "a.jsonl.zst": "zstd-compressed JSON Lines",
    "a.json": "JSON",
    "a.ipynb": "JSON",
    "a.csv": "CSV",
    "a.tsv": "TSV",
    "a.csv.bz2": "bzip2-compressed CSV",
    "a.txt.gz": "gzip-compressed",
    "a.tar.gz": "gzip-compressed tar",
    "a.parquet": "Parquet",
    "a.arrow": "Arrow",
    "a.array_record": "ArrayRecord",
    "a.npy": "NumPy",
    "train.bin": TOKEN_IDS,
    "train.idx": TOKEN_IDS,
}
TEXTS = [
    "{curly} prose\n{and} more\n",
    '{"Ah!" she said.}\n{"Oh!" said he.}\n',
    "{\n  not json\n}\n",
    "[link](https://example.com)\n",
    '["a", "b"] is a list\n',
    "{" * 100_000,
    '["' * 100_000,
    "name,age\nAda,36\n",
    '# Title\n\n{"text": "an example"}\n{"text": "another"}\n',
    '{"text": "an example"}\nis a line of JSON Lines\n',
    "x = {}\n",
    "\n\n  \n",
]


@pytest.mark.parametrize(("kind", "content"), CONTENTS.items())
@pytest.mark.parametrize("name", ["a.txt", "a"])
def test_content_is_recognized(tmp_path, kind, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_corpus([str(tmp_path / name)])
    assert str(error.value) == f"paths={str(tmp_path / name)!r} is {kind}, {CONVERT}"


@pytest.mark.parametrize(("name", "kind"), NAMES.items())
def test_name_is_believed(tmp_path, name, kind):
    (tmp_path / name).write_text("would be text under another name\n")
    with pytest.raises(ConfigError) as error:
        load_corpus([str(tmp_path / name)])
    assert str(error.value) == f"paths={str(tmp_path / name)!r} is {kind}, {CONVERT}"


def test_token_ids_without_a_beginning_of_their_own(tmp_path):
    (tmp_path / "ids").write_bytes(array.array("H", range(60_000)).tobytes())
    with pytest.raises(NotTextError, match=r"is binary \(it has a NUL byte\)"):
        read_text(tmp_path / "ids")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("name", ["a.txt", "a.py", "a.md", "a"])
def test_text_is_text_whatever_it_begins_with(tmp_path, text, name):
    (tmp_path / name).write_text(text)
    assert read_text(tmp_path / name) == text


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "a.txt"
    for content, text in [(b"\xef\xbb\xbfa\r\nb\rc\n", "a\r\nb\rc\n"), ("a\ufeffb".encode(), "a\ufeffb")]:
        path.write_bytes(content)
        assert read_text(path) == text
    path.write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(NotTextError, match="is empty; name a non-empty UTF-8 text file"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbf" + ROWS.encode())
    with pytest.raises(NotTextError, match="is JSON Lines"):
        read_text(path)


def test_what_is_no_regular_file_is_not_opened(tmp_path, monkeypatch):
    """A pipe would wait for its writer, and /dev/zero never ends."""
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)  # a socket's path may have 107 bytes
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind("socket")
        (tmp_path / "a.txt").write_text("text")
        for path in ("pipe", "socket", "/dev/zero", "/dev/null"):
            with pytest.raises(ConfigError, match=rf"^paths='{path}' is not a regular file; name a non-empty UTF-8"):
                load_corpus([path])
        assert [document.name for document in load_corpus([str(tmp_path)])] == [f"{tmp_path.name}/a.txt"]


def test_a_large_binary_file_is_not_read_whole(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"text\0" + bytes(2**20))
    monkeypatch.setattr("pathlib.Path.read_bytes", lambda _: pytest.fail("read whole"))
    with pytest.raises(NotTextError, match="is binary"):
        read_text(tmp_path / "a")
