"""Safetensors folders: what is written is read, and what is broken or hostile gets one line and opens nothing."""

import json
import pickle
import struct

import ml_dtypes
import numpy as np
import pytest

from moejax.checks import ConfigError
from moejax.interop.tensors import INDEX, ONE_FILE, NewTensor, find_tensors, give_name, new_folder, write_tensors

ARRAYS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.arange(5, dtype=np.float16),
}


def write(folder, arrays=None, **options):
    folder.mkdir(exist_ok=True)
    arrays = ARRAYS if arrays is None else arrays
    write_tensors(folder, [NewTensor(n, x.shape, x.dtype, lambda x=x: x) for n, x in arrays.items()], **options)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "checkpoint")


@pytest.fixture
def indexed(tmp_path):
    return write(tmp_path / "checkpoint", max_file=24)


def rewrite_header(file, change):
    """Changes the header of a safetensors file and leaves its bytes."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def rewrite_index(folder, change):
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("max_file", [1 << 20, 24, 1])
def test_what_is_written_is_read(tmp_path, max_file):
    folder = write(tmp_path / "checkpoint", max_file=max_file)
    files = list(folder.glob("*.safetensors"))
    assert len(files) == {1 << 20: 1, 24: 2, 1: 3}[max_file]
    assert (folder / INDEX).exists() == (len(files) > 1)
    found = find_tensors(folder)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert found[name].open().dtype == array.dtype
        np.testing.assert_array_equal(found[name].open(), array)


def test_files_have_no_tensor_beyond_their_size(tmp_path):
    folder = write(tmp_path / "checkpoint", max_file=24)
    sizes = [array.nbytes for array in ARRAYS.values()]
    assert max(sizes) == 24
    assert json.loads((folder / INDEX).read_text())["metadata"]["total_size"] == sum(sizes)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('a pickle was opened')",))


def pickled(folder):
    (folder / ONE_FILE).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def truncated(folder):
    content = (folder / ONE_FILE).read_bytes()
    (folder / ONE_FILE).write_bytes(content[:-4])


def with_entry(**changes):
    return lambda folder: rewrite_header(folder / ONE_FILE, lambda header: header["a"].update(changes))


BROKEN = {
    "no weights": (lambda folder: (folder / ONE_FILE).unlink(), "has neither model.safetensors nor"),
    "a pickle": (pickled, "pytorch_model.bin is a pickle, which can run code and is not opened"),
    "truncated": (truncated, "is truncated: c ends at byte"),
    "an empty file": (lambda folder: (folder / ONE_FILE).write_bytes(b""), "is no whole safetensors file"),
    "a header longer than the file": (
        lambda folder: (folder / ONE_FILE).write_bytes(struct.pack("<Q", 1 << 60) + b"{}"),
        "is no whole safetensors file: its header would have 1,152,921,504,606,846,976 bytes",
    ),
    "no JSON": (lambda folder: (folder / ONE_FILE).write_bytes(struct.pack("<Q", 4) + b"\xff\xfe{}"), "has no JSON"),
    "a key twice": (
        lambda folder: (folder / ONE_FILE).write_bytes(struct.pack("<Q", 17) + b'{"a": {}, "a":{}}'),
        "has the key 'a' twice",
    ),
    "another shape than its bytes": (with_entry(shape=[2, 4]), r"has 24 bytes for a, whose F32\[2, 4\] needs 32"),
    "a negative size": (with_entry(shape=[-2, -3]), "describes a by"),
    "no offsets": (with_entry(data_offsets=None), "describes a by"),
    "overlapping tensors": (with_entry(data_offsets=[4, 28]), "has a and b in the same bytes"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_gets_one_line(folder, damage, message):
    damage(folder)
    with pytest.raises(ConfigError, match=message) as error:
        find_tensors(folder)
    assert "\n" not in str(error.value)


BROKEN_INDEX = {
    "a missing file": (
        lambda folder: (folder / "model-00002-of-00002.safetensors").unlink(),
        "lacks model-00002-of-00002.safetensors, which model.safetensors.index.json names",
    ),
    "a path outside": (
        lambda folder: rewrite_index(folder, lambda where: where.update(a="../secret.safetensors")),
        "names the file '../secret.safetensors'; it must be a .safetensors file in the same folder",
    ),
    "another format": (lambda folder: rewrite_index(folder, lambda where: where.update(a="a.bin")), "the file 'a.bin'"),
    "a tensor that no file has": (
        lambda folder: rewrite_index(folder, lambda where: where.update(d=where["a"])),
        "names 1 tensors that its files lack: d",
    ),
    "a tensor that it does not name": (
        lambda folder: rewrite_index(folder, lambda where: where.pop("b")),
        "has b, and model.safetensors.index.json does not say so",
    ),
    "a key twice": (
        lambda folder: (folder / INDEX).write_text('{"weight_map": {"a": "x.safetensors", "a": "x.safetensors"}}'),
        "has the key 'a' twice",
    ),
    "no map": (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    "no object": (lambda folder: (folder / INDEX).write_text("[]"), "has a JSON list where an object should be"),
}


@pytest.mark.parametrize(("damage", "message"), BROKEN_INDEX.values(), ids=BROKEN_INDEX)
def test_a_broken_index_gets_one_line(indexed, damage, message):
    damage(indexed)
    with pytest.raises(ConfigError, match=message) as error:
        find_tensors(indexed)
    assert "\n" not in str(error.value)


def test_a_folder_has_its_name_only_when_it_is_whole(tmp_path):
    partial = new_folder(tmp_path / "out")
    (partial / "half").touch()
    assert not (tmp_path / "out").exists()
    partial = new_folder(tmp_path / "out")  # after a run that was stopped
    assert not list(partial.iterdir())
    (partial / "all").touch()
    give_name(partial, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "all"]
    with pytest.raises(ConfigError, match="is there and not empty; name a new folder"):
        new_folder(tmp_path / "out")
