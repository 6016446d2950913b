"""Fields that published config.json files have and transformers does not write; and models that leave with zeros."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest

from experiments.published_runs.architecture import Architecture
from experiments.published_runs.models import find_architecture
from moejax import Layout, MeshConfig, Program, build_mesh
from moejax.checks import ConfigError
from moejax.config import AttentionConfig, LatentConfig, ModelConfig, RopeConfig, RopeScalingConfig, RouterConfig
from moejax.data.tokenizer import ByteTokenizer
from moejax.interop import load_hf, read_model_config, save_hf, special_token_ids, tokenizer_files
from moejax.interop.families import FAMILIES
from moejax.interop.tensors import NewTensor, find_tensors, write_tensors
from moejax.sharding import by_name, init_params, param_table

SIZES = ModelConfig(
    num_layers=3, d_model=32, attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8), d_ff=16,
    num_experts=8, vocab_size=64, max_seq_len=128, dtype="float32",
)  # fmt: skip
DENSE = dataclasses.replace(SIZES, num_experts=1, experts_per_token=1)
SIGMOID = dataclasses.replace(SIZES, router=RouterConfig("sigmoid", bias=True), shared_d_ff=16)


def attention(**fields):
    return dataclasses.replace(SIZES.attention, **fields)


LATENT = AttentionConfig(4, 4, 24, latent=LatentConfig(kv_rank=16, q_rank=8, rope_head_dim=8, value_head_dim=16))
OF_TRAINING = {"aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, "pretraining_tp": 1, "moe_layer_freq": 1}
# A model of each family, and fields that change nothing in it.
PUBLISHED = {
    "llama": (DENSE, {"is_llama_config": True, "rope_interleaved": False, "pretraining_tp": 1}),
    "qwen2": (
        dataclasses.replace(DENSE, attention=attention(bias=True)),
        {"use_mrope": False, "use_sliding_window": False, "sliding_window": 64, "max_window_layers": 2},
    ),
    "deepseek_v3": (
        dataclasses.replace(
            SIGMOID, attention=LATENT, router=dataclasses.replace(SIGMOID.router, num_groups=4, groups_per_token=2),
        ),
        OF_TRAINING | {"num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    ),
    "kimi_k2": (
        dataclasses.replace(
            SIGMOID, attention=dataclasses.replace(LATENT, latent=dataclasses.replace(LATENT.latent, q_rank=0)),
        ),
        OF_TRAINING | {"q_lora_rank": None, "rope_interleave": True, "head_dim": 8, "qk_head_dim": 24},
    ),
    "deepseek_v2": (
        dataclasses.replace(SIGMOID, attention=LATENT, router=RouterConfig(renormalize=False, scaling=16.0)),
        OF_TRAINING | {"n_group": 8, "topk_group": 3},
    ),
    "dots1": (
        dataclasses.replace(SIGMOID, attention=attention(qk_norm="head")),
        {"scoring_func": "noaux_tc", "topk_method": "noaux_tc", "sliding_window": None, "max_window_layers": 3},
    ),
    "minimax_m2": (
        dataclasses.replace(SIGMOID, shared_d_ff=0, attention=attention(qk_norm="projection")),
        {
            "use_mtp": True, "num_mtp_modules": 3, "mtp_transformer_layers": 1, "attn_type_list": [1, 1, 1],
            "shared_intermediate_size": 0, "shared_moe_mode": "sigmoid", "layernorm_full_attention_beta": 1.0,
            "layernorm_linear_attention_beta": 1.0, "layernorm_mlp_beta": 1.0, "sliding_window": None,
            "mlp_intermediate_size": 64, "qk_norm_type": "per_layer", "use_qk_norm": True,
        },
    ),
    "ernie4_5_moe": (
        dataclasses.replace(SIGMOID, router=RouterConfig(bias=True)),
        {
            "num_nextn_predict_layers": 1, "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True,
            "use_rmsnorm": True, "compression_ratio": 1.0,
        },
    ),
}  # fmt: skip

# A family, fields that do change the model, and the message.
CHANGED = {
    "neighbors rotated": ("llama", {"rope_interleaved": True}, "rope_interleaved=true, and moejax has RoPE that"),
    "three positions": ("qwen2", {"use_mrope": True}, "use_mrope=true, and moejax has positions of one dimension"),
    "halves rotated": ("deepseek_v3", {"rope_interleave": False}, "rope_interleave=false, and moejax has RoPE that"),
    "biases of latents": ("deepseek_v3", {"attention_bias": True}, "attention_bias=true, and moejax has no biases in"),
    "shared keys": ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads=2, and moejax has keys and values"),
    "renormalized gates": ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob=true, and moejax has gates as"),
    "groups that are too small": ("deepseek_v3", {"n_group": 8}, "router.num_groups=8 must divide num_experts=8 into"),
    "a window in late layers": (
        "dots1",
        {"layer_types": None, "sliding_window": 64, "max_window_layers": 1},
        "max_window_layers=1, and moejax has no window of attention; only 3 or more can be loaded",
    ),
    "linear attention": ("minimax_m2", {"attn_type_list": [1, 0, 1]}, r"attn_type_list=\[1, 0, 1\], and moejax has"),
    "scaled residuals": ("minimax_m2", {"layernorm_mlp_beta": 3.5}, "layernorm_mlp_beta=3.5, and moejax has residuals"),
    "compressed positions": ("ernie4_5_moe", {"compression_ratio": 2.0}, "compression_ratio=2.0, and moejax has"),
    "another router": ("ernie4_5_moe", {"moe_gate": "switch"}, 'moe_gate="switch", and moejax has no other router'),
}  # fmt: skip


def write_config(folder, name, model, fields):
    config = {"model_type": name} | FAMILIES[name].write_config(model) | fields
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", PUBLISHED)
def test_fields_of_published_files_change_nothing(name, tmp_path):
    model, fields = PUBLISHED[name]
    found = read_model_config(write_config(tmp_path, name, model, fields))
    assert found == dataclasses.replace(model, dtype="bfloat16")


@pytest.mark.parametrize(("name", "fields", "message"), CHANGED.values(), ids=CHANGED)
def test_fields_that_change_the_model_are_refused(name, fields, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        read_model_config(write_config(tmp_path, name, PUBLISHED[name][0], fields))


@pytest.mark.parametrize("types", [None, ["full_attention"] * 3])
def test_where_no_layer_has_the_window_it_says_nothing(types, tmp_path):
    fields = {"sliding_window": 64, "max_window_layers": 3 if types is None else 1, "layer_types": types}
    model = PUBLISHED["dots1"][0]
    found = read_model_config(write_config(tmp_path, "dots1", model, fields))
    assert found == dataclasses.replace(model, dtype="bfloat16")


def test_llama_2_has_no_base_of_rope(tmp_path):
    write_config(tmp_path, "llama", DENSE, {})
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rope_theta"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_config(tmp_path).rope.theta == 10_000


YARN = RopeScalingConfig("yarn", 40.0, 4096, attention_factor=1.0)


@pytest.mark.parametrize("scale_all", [1.0, 0.707])
def test_yarn_raises_the_scores_and_leaves_as_it_came(scale_all, tmp_path):
    multiplier = 24**-0.5 * (0.1 * scale_all * math.log(40) + 1) ** 2
    attention = dataclasses.replace(LATENT, multiplier=multiplier)
    model = dataclasses.replace(PUBLISHED["deepseek_v3"][0], attention=attention, rope=RopeConfig(scaling=YARN))
    saved(model, tmp_path / "m")
    said = json.loads((tmp_path / "m" / "config.json").read_text())["rope_scaling"]
    assert (said["mscale"], said["mscale_all_dim"], "attention_factor" in said) == (scale_all, scale_all, False)
    assert read_model_config(tmp_path / "m") == dataclasses.replace(model, dtype="bfloat16")


# What config.json of deepseek-ai/DeepSeek-V3 says of the model.
DEEPSEEK_V3 = OF_TRAINING | {
    "model_type": "deepseek_v3", "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0,
    "eos_token_id": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "initializer_range": 0.02, "intermediate_size": 18_432, "kv_lora_rank": 512, "max_position_embeddings": 163_840,
    "moe_intermediate_size": 2048, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": True, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "quantization_config": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-6, "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "rope_theta": 10_000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True, "v_head_dim": 128,
    "vocab_size": 129_280,
}  # fmt: skip
MOONLIGHT = {  # of moonshotai/Moonlight-16B-A3B, where it differs
    "first_k_dense_replace": 1, "hidden_size": 2048, "intermediate_size": 11_264, "max_position_embeddings": 8192,
    "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2,
    "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
    "num_nextn_predict_layers": 0, "q_lora_rank": None, "quantization_config": None, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "rope_theta": 50_000.0, "routed_scaling_factor": 2.446, "topk_group": 1,
    "vocab_size": 163_840,
}  # fmt: skip
KIMI_K2 = {  # of moonshotai/Kimi-K2-Instruct-0905
    "model_type": "kimi_k2", "first_k_dense_replace": 1, "max_position_embeddings": 262_144, "n_group": 1,
    "n_routed_experts": 384, "num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0,
    "rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 64.0},
    "rope_theta": 50_000.0, "routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163_840,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "changes"), [("DeepSeek-V3", {}), ("Moonlight-16B-A3B", MOONLIGHT), ("Kimi-K2", KIMI_K2)]
)
def test_published_models_have_their_published_sizes(name, changes, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(DEEPSEEK_V3 | changes))
    model, published = read_model_config(tmp_path), find_architecture(name)
    numbers = [math.prod(p.shape) for p in by_name(param_table(model, Layout())).values()]
    assert sum(numbers) == published.parameters
    assert Architecture.from_config(model).flops_per_token(4096) == published.flops_per_token(4096)


def program_of(model):
    layout = Layout(MeshConfig(), seq_len=16, batch_size=2, num_microbatches=1)
    return Program(model, layout, build_mesh(layout.mesh, jax.devices()[:1]))


def saved(model, folder, **fields):
    program = program_of(model)
    params = init_params(program.table, program.mesh, jax.random.key(0))
    return params, save_hf(folder, program, params, dtype="float32", **fields)


def with_tensors(folder, **more):
    """Writes tensors into a checkpoint of one file, beside its own."""
    arrays = {name: np.array(tensor.open()) for name, tensor in find_tensors(folder).items()} | more
    write_tensors(folder, [NewTensor(n, x.shape, x.dtype, lambda x=x: x) for n, x in arrays.items()])


def test_tied_embeddings_may_be_stored_twice_if_they_are_equal(tmp_path):
    model = dataclasses.replace(SIZES, tie_embeddings=True)
    params, _ = saved(model, tmp_path / "m")
    table = np.asarray(params["embed"]["table_VD"])
    with_tensors(tmp_path / "m", **{"lm_head.weight": table})
    loaded = load_hf(tmp_path / "m", program_of(model))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, params)
    with_tensors(tmp_path / "m", **{"lm_head.weight": table + 1})
    with pytest.raises(
        ConfigError, match=r"has lm_head\.weight, which differs from model\.embed_tokens\.weight although"
    ):
        load_hf(tmp_path / "m", program_of(model))


def test_frequencies_that_old_versions_stored_are_left_out(tmp_path):
    saved(DENSE, tmp_path / "m")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with_tensors(tmp_path / "m", **{name: np.ones(4, np.float32)})
    assert load_hf(tmp_path / "m", program_of(DENSE)).ignored == (name,)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path):
    model = PUBLISHED["minimax_m2"][0]
    saved(model, tmp_path / "m")
    with_tensors(tmp_path / "m", **{"model.mtp_block.0.weight": np.ones(4, np.float32)})
    assert load_hf(tmp_path / "m", program_of(model)).ignored == ("model.mtp_block.0.weight",)


def test_layers_beyond_the_last_are_left_out(tmp_path):
    model = PUBLISHED["deepseek_v3"][0]
    saved(model, tmp_path / "m")
    name = f"model.layers.{model.num_layers}.eh_proj.weight"
    with_tensors(tmp_path / "m", **{name: np.ones(4, np.float32)})
    assert load_hf(tmp_path / "m", program_of(model)).ignored == (name,)


@pytest.mark.parametrize("name", ["deepseek_v3", "kimi_k2", "deepseek_v2"])
def test_latent_attention_comes_back_as_it_left(name, tmp_path):
    model = dataclasses.replace(PUBLISHED[name][0], num_dense_layers=1, dense_d_ff=24)
    params, family = saved(model, tmp_path / "m")
    assert family == ("deepseek_v2" if name == "deepseek_v2" else "deepseek_v3")  # which transformers knows
    assert read_model_config(tmp_path / "m") == dataclasses.replace(model, dtype="bfloat16")
    jax.tree.map(np.testing.assert_array_equal, load_hf(tmp_path / "m", program_of(model)).params, params)


def test_biases_without_a_shared_expert_leave_with_one_of_zeros(tmp_path):
    model = dataclasses.replace(SIZES, attention=attention(bias=True))
    params, family = saved(model, tmp_path / "m")
    assert family == "qwen2_moe"
    read = dataclasses.replace(read_model_config(tmp_path / "m"), dtype="float32")
    assert read == dataclasses.replace(model, shared_d_ff=16, shared_gate=True)
    loaded = load_hf(tmp_path / "m", program_of(read)).params
    assert not any(np.asarray(w).any() for w in loaded["layers"]["moe"].pop("shared").values())
    jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_multipliers_leave_with_the_usual_scale_of_attention_as_a_number(tmp_path):
    model = dataclasses.replace(SIZES, residual_multiplier=0.5)
    assert saved(model, tmp_path / "m")[1] == "granitemoe"
    read = dataclasses.replace(read_model_config(tmp_path / "m"), dtype="float32")
    assert read == dataclasses.replace(model, attention=attention(multiplier=8**-0.5))


class TestSpecialTokens:
    def ids(self, folder):
        return [
            [json.loads((folder / name).read_text()).get(f"{token}_token_id") for token in ("bos", "eos")]
            for name in ("config.json", "generation_config.json")
        ]

    def save(self, folder, source):
        tokenizer = ByteTokenizer()
        ids = special_token_ids(tokenizer, source)
        saved(SIZES, folder, files=tokenizer_files(tokenizer, source), token_ids=ids)

    def test_ours_are_the_separator(self, tmp_path):
        self.save(tmp_path / "m", None)
        assert self.ids(tmp_path / "m") == [[0, 0], [0, 0]]

    def test_theirs_are_kept(self, tmp_path):
        source = tmp_path / "source"
        source.mkdir()
        (source / "tokenizer.json").write_text("{}")
        (source / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2, 7]}))
        self.save(tmp_path / "m", source)
        assert self.ids(tmp_path / "m") == [[1, [2, 7]], [1, [2, 7]]]
        generation = '{"eos_token_id": 3, "temperature": 0.6}'
        (source / "generation_config.json").write_text(generation)
        self.save(tmp_path / "n", source)
        assert self.ids(tmp_path / "n") == [[1, 3], [None, 3]]
        assert (tmp_path / "n" / "generation_config.json").read_text() == generation

    def test_a_file_names_its_folder(self, tmp_path):
        file = tmp_path / "mine.json"
        file.write_text("{}")
        (tmp_path / "chat_template.jinja").write_text("hello")
        files = tokenizer_files(ByteTokenizer(), file)
        assert (files["tokenizer.json"], files["chat_template.jinja"]) == (b"{}", b"hello")
