"""Weights in float8 are read as the products that they mean, on every mesh; what does not say enough is refused."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from interop.test_checkpoints import MODEL, logical, params_of, program_of

from moejax.checks import ConfigError
from moejax.config import AttentionConfig, LatentConfig, RouterConfig
from moejax.interop import load_hf, save_hf
from moejax.interop.tensors import NewTensor, find_tensors, write_tensors

BLOCK = (12, 20)  # divides no dim of the model: the last blocks are smaller
FP8 = {"quant_method": "fp8", "fmt": "float8_e4m3fn", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}


def quantized(x):
    """The matrix in float8, the factors of its blocks, and what they mean."""
    rows, columns = (-(-size // of) for size, of in zip(x.shape, BLOCK, strict=True))
    factors = np.zeros((rows, columns), np.float32)
    stored, meant = np.zeros(x.shape, ml_dtypes.float8_e4m3fn), np.zeros(x.shape, np.float32)
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * BLOCK[0], (i + 1) * BLOCK[0]), slice(j * BLOCK[1], (j + 1) * BLOCK[1]))
            factors[i, j] = np.abs(x[at]).max() / 448
            stored[at] = (x[at] / factors[i, j]).astype(ml_dtypes.float8_e4m3fn)
            meant[at] = stored[at].astype(np.float32) * factors[i, j]
    return stored, factors, meant


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return make_folders(tmp_path_factory.mktemp("float8"), program_of((1, 1, 1)))


def make_folders(folder, program):
    """A checkpoint in float8, and one in float32 that means the same."""
    save_hf(folder / "plain", program, params_of(program), dtype="float32")
    arrays = {name: np.array(tensor.open()) for name, tensor in find_tensors(folder / "plain").items()}
    plain, small = {}, {}
    for name, x in arrays.items():
        plain[name] = small[name] = x
        if x.ndim == 2 and "layers" in name and ".gate.weight" not in name:
            small[name], small[name + "_scale_inv"], plain[name] = quantized(x)
    config = json.loads((folder / "plain" / "config.json").read_text())
    (folder / "small").mkdir()
    (folder / "small" / "config.json").write_text(json.dumps(config | {"quantization_config": FP8}))
    write(folder / "plain", plain)
    write(folder / "small", small)
    return folder


def write(folder, arrays):
    write_tensors(folder, [NewTensor(n, x.shape, x.dtype, lambda x=x: x) for n, x in arrays.items()])


@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 2, 2)], ids=str)
def test_products_of_blocks_and_factors_are_loaded(folders, axes):
    program = program_of(axes)
    expected, found = load_hf(folders / "plain", program), load_hf(folders / "small", program)
    jax.tree.map(np.testing.assert_array_equal, logical(found.params), logical(expected.params))
    assert found.bytes_on_disk < 0.4 * expected.bytes_on_disk
    assert found.num_tensors == expected.num_tensors


def test_where_rope_pairs_neighbors_numbers_take_their_factors_along(tmp_path):
    attention = AttentionConfig(4, 4, 24, latent=LatentConfig(kv_rank=16, q_rank=8, rope_head_dim=16, value_head_dim=8))
    model = dataclasses.replace(MODEL, attention=attention, router=RouterConfig("sigmoid", bias=True), shared_d_ff=16)
    program = program_of((4, 2, 2), model)
    folders = make_folders(tmp_path, program)
    expected, found = (load_hf(folders / name, program).params for name in ("plain", "small"))
    jax.tree.map(np.testing.assert_array_equal, logical(found), logical(expected))


def no_factors(config, arrays):
    arrays.pop("model.layers.0.self_attn.q_proj.weight_scale_inv")


def too_few_factors(config, arrays):
    name = "model.layers.0.self_attn.q_proj.weight_scale_inv"
    arrays[name] = arrays[name][:1]


WRONG = {
    "no block size": (lambda config, arrays: config.pop("quantization_config"), "in float8, and config.json has no"),
    "no factors": (no_factors, "q_proj.weight in float8 without its factors, model.layers.0.self_attn.q"),
    "too few factors": (too_few_factors, r"F32\[1, 2\]; .* in blocks of \[12, 20\] needs F32\[3, 2\]"),
    "another method": (
        lambda config, arrays: config.update(quantization_config={"quant_method": "gptq", "bits": 4}),
        'moejax reads only quant_method="fp8" with weight_block_size',
    ),
    "half a block": (
        lambda config, arrays: config.update(quantization_config=FP8 | {"weight_block_size": [128, 0.5]}),
        r"weight_block_size=\[128.0, 0.5\]; it must be two positive integers",
    ),
    "an endless block": (
        lambda config, arrays: config.update(quantization_config=FP8 | {"weight_block_size": [1e999, 128]}),
        "weight_block_size=.*; it must be a list of numbers",
    ),
    "another float8": (
        lambda config, arrays: config.update(quantization_config=FP8 | {"fmt": "e5m2"}),
        'fmt="e5m2", and moejax has only e4m3, float8_e4m3fn',
    ),
    "a vector": (
        lambda config, arrays: arrays.update(
            {"model.norm.weight": np.zeros(32, ml_dtypes.float8_e4m3fn), "model.norm.weight_scale_inv": np.ones(3)}
        ),
        r"model.norm.weight in float8 as \[32\]; only matrices can be in blocks",
    ),
    "a field that nobody knows": (
        lambda config, arrays: config.update(quantization_config=FP8 | {"rotation": "hadamard"}),
        'may change the model: rotation="hadamard"',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), WRONG.values(), ids=WRONG)
def test_what_does_not_say_enough_is_refused(folders, tmp_path, edit, message):
    config = json.loads((folders / "small" / "config.json").read_text())
    arrays = {name: np.array(tensor.open()) for name, tensor in find_tensors(folders / "small").items()}
    edit(config, arrays)
    (tmp_path / "config.json").write_text(json.dumps(config))
    write(tmp_path, arrays)
    with pytest.raises(ConfigError, match=message):
        load_hf(tmp_path, program_of((1, 1, 1)))
