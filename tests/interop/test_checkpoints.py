"""Checkpoints go out and come back the same on every mesh, and one that does not fit its model is refused whole."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax import Layout, MeshConfig, Program, build_mesh
from moejax.checks import ConfigError
from moejax.config import AttentionConfig, ModelConfig, RopeConfig, RouterConfig
from moejax.interop import load_hf, read_model_config, save_hf
from moejax.interop.tensors import NewTensor, find_tensors, write_tensors
from moejax.sharding import init_params

MODEL = ModelConfig(
    num_layers=4, d_model=32, attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), d_ff=16,
    num_experts=16, vocab_size=64, max_seq_len=128, dtype="float32",
)  # fmt: skip
MESHES = [(1, 1, 1), (4, 2, 2), (2, 4, 2), (8, 1, 2)]


def program_of(axes, model=MODEL, **fields):
    mesh = MeshConfig(*axes)
    devices = jax.devices()[: mesh.expert * mesh.pipeline * mesh.tensor]
    return Program(model, Layout(mesh, 16, 16, num_microbatches=2, **fields), build_mesh(mesh, devices))


def params_of(program):
    return init_params(program.table, program.mesh, jax.random.key(0))


def logical(params):
    """Parameters with their layers in one dim, as they are on any mesh."""
    flat = jax.tree_util.tree_flatten_with_path(params)[0]
    return {
        jax.tree_util.keystr(path): np.asarray(w).reshape(-1, *w.shape[3:]) if "layers" in str(path) else np.asarray(w)
        for path, w in flat
    }


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint in float32, and the parameters that it was made of."""
    program = program_of((1, 1, 1))
    params = params_of(program)
    folder = tmp_path_factory.mktemp("stored") / "checkpoint"
    assert save_hf(folder, program, params, dtype="float32", max_file=40_000) == "mixtral"
    return folder, params


@pytest.fixture
def copy(stored, tmp_path):
    """A copy of the checkpoint in one file, and a function that changes its arrays by name."""
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "config.json").write_bytes((stored[0] / "config.json").read_bytes())
    arrays = {name: np.asarray(tensor.open()) for name, tensor in find_tensors(stored[0]).items()}

    def change(edit=lambda arrays: None):
        edit(arrays)
        write_tensors(folder, [NewTensor(n, x.shape, x.dtype, lambda x=x: x) for n, x in arrays.items()])
        return folder

    return change


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 4, 2)], ids=str)
def test_a_number_of_layers_that_no_pipeline_divides(axes, tmp_path):
    model = dataclasses.replace(MODEL, num_layers=5)
    program = program_of(axes, model)
    params = params_of(program)
    save_hf(tmp_path / "out", program, params, dtype="float32")
    assert sum("q_proj" in name for name in find_tensors(tmp_path / "out")) == 5
    assert read_model_config(tmp_path / "out").num_layers == 5
    loaded = load_hf(tmp_path / "out", program_of((4, 2, 2), model)).params
    for name, values in logical(params).items():
        one, other = values, logical(loaded)[name]
        if "layers" in name:
            assert not one[5:].any()
            assert not other[5:].any()
            one, other = one[:5], other[:5]
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("axes", [(1, 1, 1), (2, 4, 2)], ids=str)
def test_a_vocabulary_that_no_mesh_divides_is_padded_here_and_cut_there(axes, tmp_path):
    model = dataclasses.replace(MODEL, vocab_size=51)
    program = program_of(axes, model)
    params = params_of(program)
    assert params["embed"]["table_VD"].shape == (128, 32)
    assert not np.asarray(params["embed"]["table_VD"])[51:].any()
    save_hf(tmp_path / "out", program, params, dtype="float32")
    assert find_tensors(tmp_path / "out")["lm_head.weight"].shape == (51, 32)
    assert read_model_config(tmp_path / "out").vocab_size == 51
    loaded = load_hf(tmp_path / "out", program_of((4, 2, 2), model))
    assert loaded.num_params * 4 == loaded.bytes_read == loaded.bytes_on_disk
    jax.tree.map(np.testing.assert_array_equal, logical(loaded.params), logical(params))


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("expert_axes", [("expert",), ("expert", "tensor")], ids=["split", "folded"])
def test_it_comes_back_on_any_mesh_and_reads_each_byte_once(stored, axes, expert_axes):
    program = program_of(axes).with_layout(expert_axes=expert_axes)
    folder, params = stored
    loaded = load_hf(folder, program)
    assert loaded.bytes_read == loaded.bytes_on_disk == 4 * loaded.num_params
    assert jax.tree.all(jax.tree.map(lambda w, p: w.sharding.spec == p.spec, loaded.params, program.table))
    expected, found = logical(params), logical(loaded.params)
    assert expected.keys() == found.keys()
    for name, w in expected.items():
        np.testing.assert_array_equal(found[name], w, err_msg=name)


def test_the_files_are_the_same_from_any_mesh(stored, tmp_path):
    program = program_of((4, 2, 2), pipeline_repeats=2)
    save_hf(tmp_path / "out", program, load_hf(stored[0], program).params, dtype="float32", max_file=40_000)
    files = sorted(path.name for path in stored[0].iterdir())
    assert len(files) > 4
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (stored[0] / name).read_bytes(), name


def test_bfloat16_rounds_the_weights(stored, tmp_path):
    program = program_of((1, 1, 1))
    save_hf(tmp_path / "out", program, stored[1])
    loaded = load_hf(tmp_path / "out", program)
    assert loaded.bytes_on_disk == 2 * loaded.num_params
    rounded = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), stored[1])
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), loaded.params, rounded))


def test_the_model_is_in_config_json(stored):
    assert read_model_config(stored[0]) == dataclasses.replace(MODEL, dtype="bfloat16")


NORM = "model.layers.3.input_layernorm.weight"
WRONG = {
    "missing": (lambda arrays: arrays.pop(NORM), f"lacks 1 tensors of the model: {NORM}"),
    "left over": (
        lambda arrays: arrays.update({"model.layers.4.extra.weight": np.ones(3, np.float32)}),
        "has 1 tensors that the model has no place for: model.layers.4.extra.weight",
    ),
    "off by one": (
        lambda arrays: arrays.update({NORM: np.ones(33, np.float32)}),
        rf"has {NORM} as \[33\]; the model needs \[32\]",
    ),
    "not finite": (
        lambda arrays: arrays.update({NORM: np.full(32, np.nan, np.float32)}),
        f"has a NaN or an infinity in {NORM}; the checkpoint is damaged",
    ),
}


@pytest.mark.parametrize(("edit", "message"), WRONG.values(), ids=WRONG)
def test_wrong_tensors_get_one_line(copy, edit, message):
    with pytest.raises(ConfigError, match=message):
        load_hf(copy(edit), program_of((1, 1, 1)))


def test_a_dtype_that_cannot_be_read_is_named(copy):
    folder = copy()
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes().replace(b'"F32"', b'"I32"', 1))
    with pytest.raises(ConfigError, match="in I32; only F64, F32, F16, BF16, F8_E4M3 can be read"):
        load_hf(folder, program_of((1, 1, 1)))


def test_another_model_than_the_programs_is_refused_in_words_of_the_configuration(stored):
    program = program_of((1, 1, 1), dataclasses.replace(MODEL, d_ff=24, rope=RopeConfig(theta=1e6)))
    with pytest.raises(ConfigError, match=r"rope.theta=1000000.0 \(not 10000.0\), d_ff=24 \(not 16\)"):
        load_hf(stored[0], program)


CONFIGS = {
    "another family": ({"model_type": "gpt2"}, 'has model_type="gpt2"; moejax reads '),
    "no family": ({"model_type": None}, "has model_type=null; moejax reads "),
    "a field that nobody knows": ({"soft_cap": 30.0}, "may change the model: soft_cap=30.0"),
    "a window": ({"sliding_window": 4096}, "sliding_window=4096, and moejax has no window of attention"),
    "another activation": ({"hidden_act": "gelu"}, 'hidden_act="gelu", and moejax has only SiLU experts'),
    "a scaling of RoPE": ({"rope_scaling": {"type": "ntk"}}, 'has rope_type="ntk", and moejax has only default, lin'),
    "half a scaling": ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
    "a scaling that is a word": ({"rope_scaling": "yarn"}, 'rope_scaling="yarn"; it must be an object'),
    "a scaling with a field that nobody knows": (
        {"rope_scaling": {"type": "linear", "factor": 2.0, "finetuned": True}},
        "may change the model: finetuned=true",
    ),
    "too few divisors": (
        {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": [1.0], "long_factor": [1.0]}},
        "rope.scaling.short_factors has 1 numbers; with kind='longrope' it must have 4",
    ),
    "divisors that are none": (
        {"rope_scaling": {"type": "longrope", "factor": 2.0, "short_factor": "1", "long_factor": [1.0]}},
        'short_factor="1"; it must be a list of numbers',
    ),
    "a word for a number": ({"hidden_size": "big"}, 'hidden_size="big"; it must be a number'),
    "truth for a number": ({"hidden_size": True}, "hidden_size=true; it must be a number"),
    "a number for truth": ({"tie_word_embeddings": 1}, "tie_word_embeddings=1; it must be true or false"),
    "half a layer": ({"num_hidden_layers": 2.5}, "num_layers=2.5"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0; it must be an integer from 1 to 1,000,000"),
    "endless numbers": ({"rope_theta": float("inf")}, "rope_theta=.*; it must be a number"),
    "no numbers": ({"rms_norm_eps": float("nan")}, "rms_norm_eps=.*; it must be a number"),
    "a part of heads that the family does not rotate": ({"rotary_dim": 4}, "may change the model: rotary_dim=4"),
    "a scaling of nothing": (
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}},
        "original_max_position_embeddings=0; it must be an integer",
    ),
    "a scaling backward": (
        {"rope_scaling": {"type": "yarn", "factor": -2.0, "mscale": 1.0, "mscale_all_dim": 0.5}},
        "factor=-2.0; it must be positive",
    ),
    "two lines": ({"a\nb": 1}, "may change the model: a b=1"),
    "no layers": ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
    "heads that do not divide": ({"num_key_value_heads": 3}, "config.json: num_heads=4 must be a multiple of num_kv"),
    "two names that differ": ({"num_experts": 4}, "num_local_experts=16 and num_experts=4, which are the same field"),
    "rope twice": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        "has rope_theta=10000.0 and, elsewhere, 500000.0",
    ),
}


@pytest.mark.parametrize(("fields", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_field_that_is_not_understood_is_named(stored, tmp_path, fields, message):
    config = json.loads((stored[0] / "config.json").read_text()) | fields
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    with pytest.raises(ConfigError, match=message) as error:
        read_model_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_both_generations_of_rope_fields_are_read(stored, tmp_path):
    config = json.loads((stored[0] / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path) == read_model_config(stored[0])


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is not a folder"):
        read_model_config(tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"has no config\.json"):
        read_model_config(tmp_path)


def test_a_model_that_no_family_expresses_writes_nothing(tmp_path):
    router = RouterConfig(score="sigmoid", bias=True, scaling=2.0)
    program = program_of((1, 1, 1), dataclasses.replace(MODEL, router=router, logits_divisor=2.0))
    with pytest.raises(ConfigError, match=r"glm4_moe lacks logits_divisor=2\.0 \(not 1\.0\)"):
        save_hf(tmp_path / "out", program, {})
    assert not list(tmp_path.iterdir())


def test_a_model_without_the_shared_expert_of_its_family_gets_one_of_zeros(tmp_path):
    program = program_of((4, 2, 2), dataclasses.replace(MODEL, router=RouterConfig(score="sigmoid", bias=True)))
    params = params_of(program)
    assert save_hf(tmp_path / "out", program, params, dtype="float32") == "glm4_moe"
    model = dataclasses.replace(read_model_config(tmp_path / "out"), dtype="float32")
    assert model == dataclasses.replace(program.model, shared_d_ff=program.model.d_ff)
    loaded = load_hf(tmp_path / "out", program_of((2, 1, 2), model)).params
    shared = loaded["layers"]["moe"].pop("shared")
    assert {np.abs(w).max() for w in shared.values()} == {0}
    jax.tree.map(np.testing.assert_array_equal, logical(loaded), logical(params))


def test_a_write_that_fails_leaves_nothing_that_looks_whole(stored, tmp_path):
    with pytest.raises(ZeroDivisionError):
        save_hf(tmp_path / "out", program_of((1, 1, 1)), stored[1], report=lambda line: 1 / 0)
    assert not (tmp_path / "out").exists()
