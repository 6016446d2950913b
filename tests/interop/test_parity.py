"""Logits equal those of transformers, both ways: its checkpoint loaded here, and written here for transformers.

    pip install -e ".[test,parity]" && pytest -n 0 -m parity

Models are random and tiny, with weights large enough that a wrong RoPE or gate shows.
"""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from moejax import Layout, MeshConfig, Program, build_mesh
from moejax.interop import load_hf, read_model_config, save_hf
from moejax.interop.tensors import find_tensors

pytestmark = pytest.mark.parity

TOLERANCE = 5e-5  # absolute, of logits whose root mean square is 1.6
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
LOCAL = SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2}
NARROW = LOCAL | {"moe_intermediate_size": 48, "intermediate_size": 96}
DEEPSEEK = SIZES | {
    "num_hidden_layers": 3, "moe_intermediate_size": 48, "intermediate_size": 96, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}  # fmt: skip
FAMILIES = {
    "mixtral": ("MixtralConfig", LOCAL | {"sliding_window": None}),
    "qwen3_moe": ("Qwen3MoeConfig", NARROW | {"head_dim": 16}),
    "olmoe": ("OlmoeConfig", SIZES | {"num_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        NARROW | {"num_experts": 8, "shared_expert_intermediate_size": 80, "norm_topk_prob": True},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        DEEPSEEK | {"use_qk_norm": True, "attention_bias": True, "head_dim": 16, "num_nextn_predict_layers": 0},
    ),
    "dots1": ("Dots1Config", DEEPSEEK),
    "solar_open": ("SolarOpenConfig", DEEPSEEK | {"num_hidden_layers": 2, "head_dim": 16}),
    "minimax_m2": ("MiniMaxM2Config", LOCAL | {"head_dim": 16, "rotary_dim": 8}),
    "granitemoe": (
        "GraniteMoeConfig",
        LOCAL | {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 1.5,
                 "attention_multiplier": 0.2},
    ),
}  # fmt: skip


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def theirs(request, tmp_path_factory):
    """A folder that transformers wrote, its model, tokens, and its logits."""
    import torch
    import transformers

    torch.manual_seed(0)
    config, sizes = request.param
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, config)(**sizes)).float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.2 * torch.randn_like(weight))
            if "bias" in name:
                weight.copy_(0.2 * torch.randn_like(weight))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.randn_like(buffer))
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    tokens_BS = np.random.default_rng(0).integers(0, sizes["vocab_size"], (16, 64)).astype(np.int32)
    with torch.no_grad():
        logits_BSV = model(torch.tensor(tokens_BS).long()).logits.numpy()
    return folder, model, tokens_BS, logits_BSV


@pytest.mark.filterwarnings("default")  # of torch and transformers
@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 2, 2)], ids=str)
def test_logits_equal_both_ways(theirs, axes, tmp_path):
    import torch
    import transformers

    folder, their_model, tokens_BS, logits_BSV = theirs
    assert 1 < logits_BSV.std() < 3
    mesh = MeshConfig(*axes)
    layout = Layout(mesh, *tokens_BS.shape[::-1], num_microbatches=2)
    model = dataclasses.replace(read_model_config(folder), dtype="float32")
    program = Program(model, layout, build_mesh(mesh, jax.devices()[: mesh.expert * mesh.pipeline * mesh.tensor]))
    params = load_hf(folder, program).params
    specs = (program.param_specs, program.batch_spec, program.batch_spec)
    logits = jax.jit(program.sharded(program.logits, specs, program.logits_spec))
    batch = jax.device_put((tokens_BS, np.ones_like(tokens_BS)), NamedSharding(program.mesh, program.batch_spec))
    assert np.abs(np.asarray(logits(params, *batch)) - logits_BSV).max() < TOLERANCE

    out = tmp_path / "out"
    save_hf(out, program, params, dtype="float32", max_file=200_000)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    for name, weight in their_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name
    for name, tensor in find_tensors(folder).items():
        np.testing.assert_array_equal(find_tensors(out)[name].open(), tensor.open(), err_msg=name)
