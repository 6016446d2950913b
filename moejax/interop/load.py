"""Loads a Hugging Face checkpoint onto a mesh."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding

from moejax.checks import ConfigError, check, expand
from moejax.config import ModelConfig
from moejax.interop.common import EMBEDDING, OUTPUT
from moejax.interop.families import Family, differences, find_family
from moejax.interop.float8 import Block, read_block, with_factors
from moejax.interop.hf_config import HfConfig
from moejax.interop.params import StoredParam, stored_params
from moejax.interop.rows import Row
from moejax.interop.tensors import DTYPES, StoredTensor, few, find_tensors, load_json
from moejax.interop.upcycle import Upcycling
from moejax.program import Program
from moejax.sharding import Param

CONFIG = "config.json"
# Redundant tensors of any family: RoPE's frequencies, which older versions of transformers stored.
COMPUTED = ("*.rotary_emb.inv_freq",)
OWN = frozenset({"dtype", "max_seq_len"})  # fields that change no parameter: a program may have its own


@dataclasses.dataclass(frozen=True)
class Loaded:
    """Parameters where they are stored, and what this process read for them."""

    params: Any
    model_type: str
    num_tensors: int
    num_params: int
    bytes_on_disk: int
    bytes_read: int
    ignored: tuple[str, ...]  # stored tensors that were left out on purpose

    def __str__(self) -> str:
        left_out = f", {len(self.ignored):,} tensors left out ({few(self.ignored)})" if self.ignored else ""
        return (
            f"{self.model_type}, {self.num_params:,} parameters from {self.num_tensors:,} tensors, {self.bytes_read:,} "
            f"bytes read of {self.bytes_on_disk:,}{left_out}"
        )


def read_model_config(folder: str | Path) -> ModelConfig:
    """Returns the model that a checkpoint folder's config.json describes, without reading any tensor.

    Its dtype is bfloat16, as everywhere in moejax, whatever the weights are stored in.

    Raises:
      ConfigError: moejax doesn't have the architecture, or something in it; the message names the field.
    """
    return _read_config(_checked(folder)).model


def load_hf(
    folder: str | Path,
    program: Program,
    report: Callable[[str], None] = lambda line: None,
    *,
    upcycling: Upcycling | None = None,
    seed: int = 0,
) -> Loaded:
    """Loads a checkpoint's parameters onto the program's mesh, each device's shard from its own slices of the files.

    One shard is in the host's memory at a time, and every process reads only what its devices need. The names and
    shapes of all tensors are compared with the model's before any of them is read.

    Args:
      folder: with config.json and the weights as safetensors, in one file or in several with an index.
      program: of the model that `read_model_config` returns, with any layout, dtype and max_seq_len.
      report: called with a line for each parameter.
      upcycling: what the feed-forward of a dense checkpoint becomes; the program's model is `upcycling.model(dense)`.
      seed: of the values that upcycling draws.

    Raises:
      ConfigError: the folder has another model, or a tensor that is missing, left over, damaged or not finite.
    """
    path = _checked(folder)
    family, model, block = _read_config(path)
    if upcycling is not None:
        model = upcycling.model(model)
    _check_same_model(path, model, program.model)
    tensors = with_factors(find_tensors(path), block)
    params = stored_params(family, model, program.table, upcycling.granularity if upcycling else 1)
    copy = tensors.pop(OUTPUT, None) if model.tie_embeddings else None
    used, ignored = _check_tensors(path, tensors, params, (*COMPUTED, *family.ignored(model)))
    if copy is not None:
        _check_tied(copy, tensors[EMBEDDING])
    arrays, bytes_read = [], 0
    for number, param in enumerate(params, 1):
        report(f"loading parameter {number} of {len(params)}, {param.name}")
        placed = NamedSharding(program.mesh, param.param.spec)
        if param.rows:
            array, num_bytes = _load_param(param, tensors, placed)
            if upcycling and upcycling.reinit_ratio and ".experts." in param.name:
                array = upcycling.reinitialize(param.name.rpartition(".")[2], array, param.param, seed)
        else:
            array, num_bytes = _make_router(param, model, upcycling, seed, placed), 0
        arrays.append(array)
        bytes_read += num_bytes
    treedef = jax.tree.structure(program.table, is_leaf=lambda x: isinstance(x, Param))
    return Loaded(
        params=jax.tree.unflatten(treedef, arrays),
        model_type=family.model_type,
        num_tensors=len(used),
        num_params=sum(len(param.layers) * math.prod(param.layer_shape) for param in params),
        bytes_on_disk=sum(tensors[name].num_bytes for name in used),
        bytes_read=bytes_read,
        ignored=ignored,
    )


def _checked(folder: str | Path) -> Path:
    path = expand(folder, "folder")
    check(path.is_dir(), f"folder={path} is not a folder; name one with {CONFIG} and .safetensors files")
    check((path / CONFIG).is_file(), f"folder={path} has no {CONFIG}; name the folder of a Hugging Face checkpoint")
    return path


class _Description(NamedTuple):
    """What a config.json says: the family, the model, and the blocks of weights in float8."""

    family: Family
    model: ModelConfig
    block: Block | None


def _read_config(folder: Path) -> _Description:
    source = folder / CONFIG
    fields = load_json(source)
    family = find_family(fields, source)
    config = HfConfig(fields, source)
    try:
        model = family.read_config(config)
    except ConfigError as error:
        text = str(error)
        raise ConfigError(text if text.startswith(str(source)) else f"{source}: {text}") from None
    block = read_block(config)
    config.finish()
    return _Description(family, model, block)


def _check_same_model(folder: Path, stored: ModelConfig, wanted: ModelConfig) -> None:
    differ = differences(wanted, stored, without=OWN)
    check(not differ, f"folder={folder} holds another model than the program's: {', '.join(differ)}")


def _check_tied(output: StoredTensor, embedding: StoredTensor) -> None:
    """Raises `ConfigError` if the output layer of a model with tied embeddings is not a copy of them."""
    pairs = [(output, embedding)]
    if output.factors and embedding.factors:
        pairs.append((output.factors.tensor, embedding.factors.tensor))
    same = all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and np.array_equal(a.open().view(np.uint8), b.open().view(np.uint8))
        for a, b in pairs
    )
    check(
        same,
        f"{output.file} has {OUTPUT}, which differs from {EMBEDDING} although {CONFIG} says that they are tied "
        "(tie_word_embeddings)",
    )


def _check_tensors(
    folder: Path, tensors: Mapping[str, StoredTensor], params: Sequence[StoredParam], patterns: tuple[str, ...]
) -> tuple[list[str], tuple[str, ...]]:
    """Returns the names of the tensors that are used, and those that match a pattern; others are an error."""
    wanted = dict(itertools.chain.from_iterable(param.stored_shapes() for param in params))
    missing = [name for name in wanted if name not in tensors]
    check(not missing, f"folder={folder} lacks {len(missing):,} tensors of the model: {few(missing)}")
    rest = sorted(tensors.keys() - wanted.keys())
    ignored = tuple(name for name in rest if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
    left_over = [name for name in rest if name not in ignored]
    check(
        not left_over,
        f"folder={folder} has {len(left_over):,} tensors that the model has no place for: {few(left_over)}",
    )
    for name, shape in wanted.items():
        found = tensors[name]
        check(found.shape == shape, f"{found.file} has {name} as {list(found.shape)}; the model needs {list(shape)}")
        check(
            found.dtype in DTYPES,
            f"{found.file} has {name} in {found.dtype}; only {', '.join(DTYPES)} can be read",
        )
    return list(wanted), ignored


def _make_router(
    stored: StoredParam, m: ModelConfig, upcycling: Upcycling | None, seed: int, sharding: NamedSharding
) -> jax.Array:
    """Returns the routers of a model whose checkpoint has none; a single expert's gate is 1 whatever they say."""
    shape = stored.param.shape
    routers = np.zeros(shape, np.float32)
    if upcycling:
        routers.reshape(-1, *shape[-2:])[: len(stored.layers)] = upcycling.router(len(stored.layers), m.d_model, seed)
    return jax.make_array_from_callback(shape, sharding, routers.__getitem__)


def _load_param(
    stored: StoredParam, tensors: Mapping[str, StoredTensor], sharding: NamedSharding
) -> tuple[jax.Array, int]:
    """Returns a parameter in float32 where it is stored, and the bytes read for it; devices alike share a shard."""
    shape = stored.param.shape
    shards: dict[tuple[range, ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        part = tuple(range(*s.indices(size)) for s, size in zip(index or (), shape, strict=True))
        shards.setdefault(part, []).append(device)
    arrays: dict[jax.Device, jax.Array] = {}
    bytes_read = 0
    for part, devices in shards.items():
        shard, num_bytes = _read_shard(stored, tensors, part)
        arrays |= {device: jax.device_put(shard, device) for device in devices}
        bytes_read += num_bytes
    ordered = [arrays[device] for device in sharding.addressable_devices]
    return jax.make_array_from_single_device_arrays(shape, sharding, ordered), bytes_read


def _read_shard(
    stored: StoredParam, tensors: Mapping[str, StoredTensor], index: tuple[range, ...]
) -> tuple[np.ndarray, int]:
    """Returns a slice of the parameter in float32, and the bytes read for it."""
    stack = stored.param.stack
    stack_index, layer_index = index[: len(stack)], index[len(stack) :]
    in_order = np.arange(math.prod(stack)).reshape(stack)[tuple(slice(part.start, part.stop) for part in stack_index)]
    shard = np.zeros((in_order.size, *map(len, layer_index)), np.float32)
    layers = [stored.layers[i] for i in in_order.flat if i < len(stored.layers)]  # places at the end have none
    layer_index = tuple(  # without the padding
        range(part.start, max(part.start, min(part.stop, size)))
        for part, size in zip(layer_index, stored.layer_shape, strict=True)
    )
    filled = shard[(slice(None), *(slice(0, len(part)) for part in layer_index))]
    bytes_read = 0
    for row in stored.rows:
        at = dict(zip(row.dims, layer_index, strict=True))
        experts = [0] if row.has_experts else at["E"]
        if row.part is not None and row.part not in at["G"]:
            continue
        for (i, layer), expert in itertools.product(enumerate(layers), experts):
            name = row.stored.format(layer=layer, expert=expert)
            within = at
            if stored.slices > 1 and not row.has_experts:
                first = expert % stored.slices * (stored.disk_shape[row.dims.index("F")] // stored.slices)
                within = at | {"F": range(at["F"].start + first, at["F"].stop + first)}
            piece, num_bytes = _read_piece(row, tensors[name], stored.disk_shape, within)
            bytes_read += num_bytes
            check(
                bool(np.isfinite(piece).all()),
                f"{tensors[name].file} has a NaN or an infinity in {name}; the checkpoint is damaged",
            )
            place: dict[str, int] = {}
            if row.part is not None:
                place["G"] = row.part - at["G"].start
            if not row.has_experts:
                place["E"] = expert - at["E"].start
            filled[(i, *(place.get(dim, slice(None)) for dim in row.dims))] = piece
    if stored.slices > 1 and stored.name.endswith(".w_out_EFD"):
        shard *= stored.slices  # as the gates of the slices of a copy add up to that of the copy
    return shard.reshape([len(part) for part in index]), bytes_read


def _read_piece(
    row: Row, tensor: StoredTensor, shape: tuple[int, ...], within: Mapping[str, range]
) -> tuple[np.ndarray, int]:
    """Returns a slice of a stored tensor as `Row.read` does, with the factors of float8, and the bytes read for it."""
    piece = row.read(tensor.open(), shape, within)
    if tensor.factors is None:
        return piece, piece.nbytes
    factors = row.read(tensor.factors.expanded(tensor.shape), shape, within)
    return piece.astype(np.float32) * factors, piece.nbytes + tensor.factors.tensor.num_bytes
