"""Reads slices of tensors from a folder of safetensors files, and writes such a folder tensor by tensor.

A safetensors file is 8 bytes with the length of a JSON header, the header with each tensor's dtype, shape and place,
and the bytes (https://huggingface.co/docs/safetensors). Files are mapped into memory, so that a slice reads only its
own bytes. The library of that name reads no float8 into NumPy, and holds a whole file in memory to write it.

Nothing in a folder is trusted: a header or an index that does not describe its files exactly is refused before any
tensor is read, and formats that can run code, such as PyTorch's pickles, are not opened.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from moejax import strict_json
from moejax.checks import ConfigError, check

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
FLOAT8 = "F8_E4M3"  # with factors: see moejax.interop.float8
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 100 << 20  # bytes; the format's own limit
MAX_FILE = 5 << 30  # bytes of a file that is written, as on the Hub


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: its file, dtype (a key of `DTYPES`, or another that cannot be read), shape and first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    factors: BlockFactors | None = None

    def open(self) -> np.ndarray:
        """Maps the tensor into memory; only what is used of it is read."""
        dtype = DTYPES[self.dtype]
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)
        mapped = np.memmap(self.file, dtype, mode="r", offset=self.offset, shape=(math.prod(self.shape),))
        return mapped.reshape(self.shape)

    @property
    def num_bytes(self) -> int:
        own = math.prod(self.shape) * DTYPES[self.dtype].itemsize
        return own + (self.factors.tensor.num_bytes if self.factors else 0)


@dataclasses.dataclass(frozen=True)
class BlockFactors:
    """Numbers that the blocks of a matrix are multiplied by: a stored tensor, and the rows and columns of a block."""

    tensor: StoredTensor
    block: tuple[int, int]

    def expanded(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns a factor for each element of a matrix of this shape, float32."""
        row_of, column_of = (np.arange(size) // of for size, of in zip(shape, self.block, strict=True))
        return self.tensor.open().astype(np.float32)[row_of][:, column_of]


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write: its name, shape and dtype, and a function that returns its values when their turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    values: Callable[[], np.ndarray]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def find_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns every tensor of a checkpoint folder by its name, from the files' headers alone.

    Raises:
      ConfigError: there are no safetensors files, one is missing or damaged, or the index contradicts them.
    """
    if (folder / INDEX).is_file():
        return _find_indexed(folder)
    file = folder / ONE_FILE
    if not file.is_file():
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        instead = f"; {pickles[0]} is a pickle, which can run code and is not opened: convert it" if pickles else ""
        raise ConfigError(f"{folder} has neither {ONE_FILE} nor {INDEX}{instead}")
    return _read_header(file)


def _find_indexed(folder: Path) -> dict[str, StoredTensor]:
    index = folder / INDEX
    content = load_json(index)
    where = content.get("weight_map", {})
    if not where or not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise ConfigError(f"{index} has no weight_map of tensor names and file names")
    files = sorted(set(where.values()))
    for name in files:
        check(
            name == os.path.basename(name) and name.endswith(".safetensors"),
            f"{index} names the file {name!r}; it must be a .safetensors file in the same folder",
        )
        check((folder / name).is_file(), f"{folder} lacks {name}, which {INDEX} names; download it again")
    found: dict[str, StoredTensor] = {}
    for name in files:
        header = _read_header(folder / name)
        for tensor in header:
            check(tensor not in found, f"{folder} has {tensor} in two files, one of them {name}")
            check(where.get(tensor) == name, f"{folder / name} has {tensor}, and {INDEX} does not say so")
        found |= header
    missing = sorted(where.keys() - found.keys())
    check(not missing, f"{index} names {len(missing)} tensors that its files lack: {few(missing)}")
    return found


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        check(
            length <= min(MAX_HEADER, size - 8),
            f"{file} is no whole safetensors file: its header would have {length:,} bytes, and the file has {size:,}",
        )
        text = opened.read(length)
    header = parse_json(text, file)
    header.pop("__metadata__", None)
    found: dict[str, StoredTensor] = {}
    spans = []
    for name, entry in header.items():
        dtype, shape, begin, end = _check_entry(file, name, entry)
        check(
            8 + length + end <= size,
            f"{file} is truncated: {name} ends at byte {8 + length + end:,}, and the file has {size:,}; download it "
            "again",
        )
        found[name] = StoredTensor(file, dtype, shape, 8 + length + begin)
        spans.append((begin, end, name))
    spans.sort()
    for (_, end, name), (begin, _, following) in itertools.pairwise(spans):
        check(end <= begin, f"{file} has {name} and {following} in the same bytes")
    return found


def _check_entry(file: Path, name: str, entry: Any) -> tuple[str, tuple[int, ...], int, int]:
    try:
        dtype, shape, (begin, end) = str(entry["dtype"]), tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        whole = False
    check(whole, f"{file} describes {name} by {str(entry)[:80]!r}, without dtype, shape and data_offsets of a tensor")
    if dtype in DTYPES:
        need = math.prod(shape) * DTYPES[dtype].itemsize
        check(
            end - begin == need,
            f"{file} has {end - begin:,} bytes for {name}, whose {dtype}{list(shape)} needs {need:,}",
        )
    return dtype, shape, begin, end


def load_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file, in which no key may come twice; `ConfigError` names the file otherwise."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from None
    return parse_json(text, path)


def parse_json(text: bytes, source: Path) -> dict[str, Any]:
    """Returns the JSON object in `text`, which is of the file `source`; see `load_json`."""

    def without_repeats(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        for key, _ in pairs if len(content) < len(pairs) else ():
            check(sum(key == other for other, _ in pairs) == 1, f"{source} has the key {key!r} twice")
        return content

    try:
        content = json.loads(text.decode(), object_pairs_hook=without_repeats)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or a number of thousands of digits
        raise ConfigError(f"{source} has no JSON where it should ({error})") from None
    check(isinstance(content, dict), f"{source} has a JSON {type(content).__name__} where an object should be")
    return content


def few(names: Sequence[str]) -> str:
    """Returns the first names of a list that may be long."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def write_tensors(
    folder: Path, tensors: Sequence[NewTensor], *, max_file: int = MAX_FILE, report: Callable[[int], None] | None = None
) -> None:
    """Writes tensors one after another into files of at most `max_file` bytes, and last of all their index.

    One tensor is in memory at a time; one that is larger than `max_file` has a file of its own. `report` is called with
    the bytes written so far.
    """
    groups: list[list[NewTensor]] = []
    size = 0  # of the last group
    for tensor in tensors:
        if not groups or size + tensor.num_bytes > max_file:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.num_bytes
    names = (
        [ONE_FILE]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    written = 0
    for name, group in zip(names, groups, strict=True):
        with (folder / name).open("wb") as file:
            file.write(_header(group))
            for tensor in group:
                values = np.ascontiguousarray(tensor.values(), tensor.dtype)
                assert values.shape == tensor.shape, (tensor.name, values.shape, tensor.shape)
                file.write(values.reshape(-1).view(np.uint8).data)
                written += tensor.num_bytes
                if report:
                    report(written)
            file.flush()
            os.fsync(file.fileno())
    if len(groups) > 1:
        where = {tensor.name: name for name, group in zip(names, groups, strict=True) for tensor in group}
        index = {"metadata": {"total_size": written}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(strict_json.dumps(index, indent=2) + "\n")


def _header(tensors: Iterable[NewTensor]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        content[tensor.name] = {
            "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end],
        }  # fmt: skip
        offset = end
    text = strict_json.dumps(content).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors' bytes are aligned
    return struct.pack("<Q", len(text)) + text


def check_new(folder: Path) -> None:
    """Raises `ConfigError` for a folder with something in it, and for a file."""
    check(
        not folder.exists() or (folder.is_dir() and not any(folder.iterdir())),
        f"{folder} is there and not empty; name a new folder",
    )


def new_folder(folder: Path) -> Path:
    """Makes the folder that a checkpoint is written into before it gets the name `folder`; see `give_name`.

    Raises:
      ConfigError: `folder` exists and is not empty, or nothing can be written beside it.
    """
    check_new(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was stopped
        partial.mkdir(parents=True)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror}: {error.filename})") from None
    return partial


def give_name(partial: Path, folder: Path) -> None:
    """Gives a folder that is whole its name, at once."""
    if folder.exists():
        folder.rmdir()  # empty
    partial.rename(folder)
