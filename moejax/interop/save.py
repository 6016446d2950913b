"""Writes parameters as a Hugging Face checkpoint, which transformers, vLLM and others load."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moejax import strict_json
from moejax.checks import check, expand
from moejax.config import Dtype, ModelConfig
from moejax.data import Tokenizer
from moejax.data.separators import ENDOFTEXT
from moejax.interop.families import Family, family_to_write
from moejax.interop.load import CONFIG
from moejax.interop.params import StoredParam, stored_params
from moejax.interop.rows import Row
from moejax.interop.tensors import MAX_FILE, NewTensor, give_name, load_json, new_folder, write_tensors
from moejax.program import Program
from moejax.sharding import by_name, param_table

# What belongs to a tokenizer.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip
GENERATION = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def save_hf(
    folder: str | Path,
    program: Program,
    params: Any,
    *,
    dtype: Dtype = "bfloat16",
    files: Mapping[str, bytes] | None = None,
    token_ids: Mapping[str, Any] | None = None,
    max_file: int = MAX_FILE,
    report: Callable[[str], None] = lambda line: None,
) -> str:
    """Writes a checkpoint into a new folder, which gets its name when it is whole; returns its `model_type`.

    The architecture is the first of `moejax.interop.FAMILIES` that expresses the model exactly, and config.json is made
    from the program's model. Where an architecture always has a part that the model lacks, such as a shared expert, its
    weights are zeros. One layer of one parameter is gathered at a time. In a run of several processes, all call
    this, and process 0 writes.

    Args:
      folder: where to; must not be there, or be empty.
      program: what the parameters belong to.
      params: global arrays, as the program stores them.
      dtype: of the stored weights; a selection bias stays float32, as its steps are finer than bfloat16.
      files: more files of the folder, by name, such as `tokenizer_files` returns.
      token_ids: `bos_token_id` and others for config.json, as `special_token_ids` returns; those not in it are null.
      max_file: bytes that a file of tensors may have.
      report: called with a line as the writing goes on.

    Raises:
      ConfigError: no architecture expresses the model, or the folder cannot be written.
    """
    path = expand(folder, "folder")
    check(dtype in get_args(Dtype), f"dtype={dtype!r} must be one of {', '.join(get_args(Dtype))}")
    family, written = family_to_write(program.model)
    tensors = list(_tensors(family, written, program, params, jnp.dtype(dtype)))
    total = sum(tensor.num_bytes for tensor in tensors)
    if jax.process_index() > 0:
        for tensor in tensors:
            tensor.values()  # takes part in the gathering
        return family.model_type
    partial = new_folder(path)
    config = config_json(written, family, dtype) | {name: (token_ids or {}).get(name) for name in TOKEN_IDS}
    (partial / CONFIG).write_bytes(_json(config))
    for name, content in (files or {}).items():
        (partial / name).write_bytes(content)
    write_tensors(
        partial, tensors, max_file=max_file,
        report=lambda done: report(f"writing weights, {done / 1e9:.1f} of {total / 1e9:.1f} GB"),
    )  # fmt: skip
    give_name(partial, path)
    return family.model_type


def config_json(m: ModelConfig, family: Family, dtype: Dtype) -> dict[str, Any]:
    """Returns the config.json of a model in a family, without the ids of a tokenizer's special tokens."""
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        **family.write_config(m),
    }


def tokenizer_files(tokenizer: Tokenizer, source: str | Path | None = None) -> dict[str, bytes]:
    """Returns a checkpoint's tokenizer files: those of `source`, byte for byte, or made of `tokenizer`.

    `source` is a folder, or a file in the format of tokenizer.json, whose siblings are copied too. Without a
    generation_config.json there, one is made of `special_token_ids`.
    """
    generation = _json(special_token_ids(tokenizer, source))
    if source is not None:
        path, folder = expand(source, "source"), _folder(source)
        files = {name: (folder / name).read_bytes() for name in TOKENIZER_FILES if (folder / name).is_file()}
        if path.is_file():
            files["tokenizer.json"] = path.read_bytes()
        return {GENERATION: generation} | files
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ENDOFTEXT, "eos_token": ENDOFTEXT,
        "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    return {
        "tokenizer.json": tokenizer.to_json().encode(),
        "tokenizer_config.json": _json(settings),
        GENERATION: generation,
    }


def special_token_ids(tokenizer: Tokenizer, source: str | Path | None = None) -> dict[str, Any]:
    """Returns the ids of a checkpoint's special tokens, by their names in config.json.

    They are those of the files in the folder of `source`, generation_config.json before config.json. If neither has
    any, `tokenizer`'s separator begins a text and ends it.
    """
    ids: dict[str, Any] = {}
    files = [] if source is None else [_folder(source) / name for name in (CONFIG, GENERATION)]
    for file in files:
        fields = load_json(file) if file.is_file() else {}
        ids |= {token: fields[token] for token in TOKEN_IDS if fields.get(token) is not None}
    return ids or {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}


def _folder(source: str | Path) -> Path:
    path = expand(source, "source")
    return path.parent if path.is_file() else path


def _json(fields: Mapping[str, Any]) -> bytes:
    return (strict_json.dumps(dict(fields), indent=2) + "\n").encode()


def _tensors(
    family: Family, written: ModelConfig, program: Program, params: Any, dtype: np.dtype[Any]
) -> Iterator[NewTensor]:
    """Returns every tensor to write, layer by layer of each parameter, so that a layer is gathered once."""
    arrays = by_name(params)
    for stored in stored_params(family, written, param_table(written, program.layout)):
        gather = functools.partial(_gather_layer, stored, arrays.get(stored.name))
        layer_of = functools.lru_cache(maxsize=1)(gather)
        kept = np.dtype(np.float32) if stored.param.compute_dtype is None else dtype
        for i, layer in enumerate(stored.layers):
            for row in stored.rows:
                shape = row.stored_shape(stored.layer_shape)
                names = row.stored_names(stored.layer_shape, range(layer, layer + 1))
                for expert, name in enumerate(names):
                    values = functools.partial(_values, row, layer_of, i, expert, kept)
                    yield NewTensor(name, shape, kept, values)


def _values(row: Row, layer_of: Callable[[int], np.ndarray], i: int, expert: int, dtype: np.dtype[Any]) -> np.ndarray:
    return row.write(layer_of(i), expert).astype(dtype)


def _gather_layer(stored: StoredParam, array: jax.Array | None, i: int) -> np.ndarray:
    """Returns layer `i` of a parameter, whole, on every process; zeros where the model has no such parameter."""
    if array is None:
        return np.zeros(stored.layer_shape, np.float32)
    layer = array[np.unravel_index(i, stored.param.stack)] if stored.param.stack else array
    whole = np.asarray(multihost_utils.process_allgather(layer, tiled=True))
    return whole[tuple(map(slice, stored.layer_shape))]  # without padding
