"""Logits, loss and gradients equal those of transformers; its checkpoints are loaded here, and ours there.

    pip install -e ".[test,parity]" && pytest -n 0 -m parity

Models are random and tiny, with weights large enough that a wrong RoPE or gate shows.
"""

import collections
import dataclasses
import json
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from reports import collect

from moejax import BalanceConfig, Layout, MeshConfig, Program, build_mesh
from moejax.config import DispatchConfig
from moejax.interop import load_hf, read_model_config, save_hf
from moejax.interop.tensors import find_tensors
from moejax.nn.embedding import IGNORED
from moejax.nn.rope import frequencies, rope_table

pytestmark = pytest.mark.parity

LOGITS = 5e-5  # absolute, of logits whose root mean square is 1.6
LOSS = 2e-6  # nats
GRADIENTS = 1e-5  # of the norm of a parameter's gradient, over all layers and experts
SIZES = {
    "vocab_size": 256, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.2, "pad_token_id": None,
}  # fmt: skip
LOCAL = SIZES | {"num_local_experts": 8, "num_experts_per_tok": 2}
NARROW = LOCAL | {"moe_intermediate_size": 48, "intermediate_size": 96}
DEEPSEEK = SIZES | {
    "num_hidden_layers": 3, "moe_intermediate_size": 48, "intermediate_size": 96, "n_routed_experts": 8,
    "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
}  # fmt: skip
LATENT = DEEPSEEK | {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "rms_norm_eps": 1e-5,
}  # fmt: skip
FAMILIES = {
    "llama": ("LlamaConfig", SIZES | {"rms_norm_eps": 1e-5}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen3": ("Qwen3Config", SIZES | {"head_dim": 16, "tie_word_embeddings": True}),
    "mixtral": ("MixtralConfig", LOCAL | {"sliding_window": None}),
    "qwen3_moe": ("Qwen3MoeConfig", NARROW | {"head_dim": 16}),
    "olmoe": ("OlmoeConfig", SIZES | {"num_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        SIZES | {
            "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2,
            "shared_expert_intermediate_size": 80, "norm_topk_prob": True,
        },
    ),
    "deepseek_v3": ("DeepseekV3Config", LATENT | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}),
    "deepseek_v3, yarn, as Kimi-K2 has it": (
        "DeepseekV3Config",
        LATENT | {
            "q_lora_rank": 24, "n_group": 1, "topk_group": 1, "rope_parameters": {
                "rope_theta": 5e4, "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 32,
                "beta_fast": 1.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
            },
        },
    ),
    "deepseek_v3, as Moonlight has it": (
        "DeepseekV3Config", LATENT | {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    ),
    "deepseek_v2": (
        "DeepseekV2Config",
        LATENT | {
            "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
            "norm_topk_prob": False, "rope_parameters": {
                "rope_theta": 1e4, "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32,
                "mscale": 0.707, "mscale_all_dim": 0.707,
            },
        },
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        DEEPSEEK | {"use_qk_norm": True, "attention_bias": True, "head_dim": 16, "num_nextn_predict_layers": 0},
    ),
    "dots1": ("Dots1Config", DEEPSEEK),
    "solar_open": ("SolarOpenConfig", DEEPSEEK | {"num_hidden_layers": 2, "head_dim": 16, "first_k_dense_replace": 0}),
    "minimax_m2": ("MiniMaxM2Config", LOCAL | {"head_dim": 16, "rotary_dim": 8}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        SIZES | {
            "num_hidden_layers": 3, "moe_intermediate_size": 48, "intermediate_size": 96, "moe_num_experts": 8,
            "moe_k": 2, "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "tie_word_embeddings": False,
        },
    ),
    "qwen3_moe, yarn": (
        "Qwen3MoeConfig",
        NARROW | {
            "head_dim": 16, "rope_parameters": {
                "rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32,
            },
        },
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        LOCAL | {
            "vocab_size": 253, "tie_word_embeddings": True, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
            "logits_scaling": 1.5, "attention_multiplier": 0.2,
        },
    ),
}  # fmt: skip


# Kinds of RoPE, in the form of transformers 5; `default` is in all of the above.
SCALINGS = {
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 8192},
    "yarn, as gpt-oss has it": {
        "rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False,
        "beta_fast": 32.0, "beta_slow": 1.0,
    },
    "yarn with mscale": {
        "rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0,
        "mscale_all_dim": 0.8,
    },
    "longrope": {
        "factor": 8.0, "original_max_position_embeddings": 4096, "short_factor": [1.0 + i / 32 for i in range(32)],
        "long_factor": [1.0 + i for i in range(32)],
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Theirs:
    """A model of transformers, the folder that it wrote, and its results."""

    folder: object
    weights: dict
    tokens_BS: np.ndarray
    logits_BSV: np.ndarray
    loss: float
    grads: object  # a folder with gradients under the names of weights


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=FAMILIES)
def theirs(request, tmp_path_factory):
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
    folder, grads = tmp_path_factory.mktemp("theirs"), tmp_path_factory.mktemp("grads")
    model.save_pretrained(folder)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    tokens_BS = np.random.default_rng(0).integers(0, sizes["vocab_size"], (16, 64)).astype(np.int32)
    tokens = torch.tensor(tokens_BS).long()
    result = model(tokens, labels=tokens)
    result.loss.backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.zeros_like(weight) if weight.grad is None else weight.grad)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.zero_()
    model.save_pretrained(grads)
    return Theirs(folder, weights, tokens_BS, result.logits.detach().numpy(), float(result.loss.detach()), grads)


@pytest.fixture(scope="module")
def report(request):
    """Collects errors by family and mesh, and prints them when the module is through."""
    yield from collect(request, table)


def table(found):
    yield "against transformers: largest difference of logits and of the loss, relative one of gradients"
    for name, (logits, loss, (gradient, tensor)) in found.items():
        yield f"  {name}: {logits:.1e}, {loss:.1e}, {gradient:.1e} ({tensor})"


def program_of(folder, axes, shape, **options):
    mesh = MeshConfig(*axes)
    # A dense model has a single expert, whose width `tensor` splits.
    dispatch = DispatchConfig(expert_axes=("expert",) if mesh.expert == 1 else ("expert", "tensor"))
    layout = Layout(mesh, *shape[::-1], num_microbatches=2, dispatch=dispatch)
    model = dataclasses.replace(read_model_config(folder), dtype="float32")
    return Program(model, layout, build_mesh(mesh, jax.devices()[: math.prod(axes)]), **options)


@pytest.mark.filterwarnings("default")  # of torch and transformers
@pytest.mark.parametrize("axes", [(1, 1, 1), (4, 2, 2)], ids=str)
def test_logits_loss_and_gradients_are_theirs_and_weights_go_back(theirs, axes, tmp_path, report, request):
    import torch
    import transformers

    tokens_BS = theirs.tokens_BS
    if read_model_config(theirs.folder).num_experts == 1:
        axes = (1, *axes[1:])  # of one expert, other devices can be replicas
    assert 1 < theirs.logits_BSV.std() < 3
    balance = BalanceConfig(aux_loss_weight=0, z_loss_weight=0)
    program = program_of(theirs.folder, axes, tokens_BS.shape, balance=balance)
    params = load_hf(theirs.folder, program).params
    on_mesh = NamedSharding(program.mesh, program.batch_spec)
    specs = (program.param_specs, program.batch_spec, program.batch_spec)
    logits = jax.jit(program.sharded(program.logits, specs, program.logits_spec))
    ones_BS = np.ones_like(tokens_BS)
    found_BSV = np.asarray(logits(params, *jax.device_put((tokens_BS, ones_BS), on_mesh)))
    off = np.abs(found_BSV[..., : program.model.vocab_size] - theirs.logits_BSV).max()

    targets_BS = np.concatenate([tokens_BS[:, 1:], np.full_like(tokens_BS[:, :1], IGNORED)], axis=1)
    batch = jax.device_put({"tokens": tokens_BS, "targets": targets_BS, "segment_ids": ones_BS}, on_mesh)
    loss = program.sharded(lambda *x: program.loss(*x)[0], (program.param_specs, program.batch_spec), P())
    value, grads = jax.jit(jax.value_and_grad(loss, allow_int=True))(params, batch)
    off_loss = abs(float(value) - theirs.loss)
    save_hf(tmp_path / "grads", program, grads, dtype="float32")
    of_gradients = errors(tmp_path / "grads", theirs.grads)
    report[request.node.callspec.id] = off, off_loss, max((error, name) for name, error in of_gradients.items())
    assert off < LOGITS
    assert off_loss < LOSS
    assert {name: error for name, error in of_gradients.items() if error > GRADIENTS} == {}

    out = tmp_path / "out"
    save_hf(out, program, params, dtype="float32", max_file=200_000)
    again, loading = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values())
    for name, weight in theirs.weights.items():
        assert torch.equal(again.state_dict()[name], weight), name
    for name, tensor in find_tensors(theirs.folder).items():
        np.testing.assert_array_equal(find_tensors(out)[name].open(), tensor.open(), err_msg=name)


def errors(ours, theirs):
    """Relative errors of tensors in two folders, those of all layers and experts together."""
    sums = collections.defaultdict(lambda: np.zeros(2))
    expected = find_tensors(theirs)
    for name, tensor in find_tensors(ours).items():
        want = np.asarray(expected[name].open(), np.float64)
        sums[re.sub(r"\.\d+\.", ".*.", name)] += np.square(tensor.open() - want).sum(), np.square(want).sum()
    assert expected.keys() == find_tensors(ours).keys()
    return {name: math.sqrt(off / of) if of else math.sqrt(off) for name, (off, of) in sums.items()}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("generation", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", SCALINGS)
def test_rope_scalings_are_theirs_at_32k_positions(name, generation, tmp_path):
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_type": name} | SCALINGS[name]
    sizes = LOCAL | {"head_dim": 64, "max_position_embeddings": 32_768, "sliding_window": None}
    their_config = transformers.MixtralConfig(**sizes, rope_parameters=scaling | {"rope_theta": 500_000.0})
    theirs_F, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](their_config, "cpu", seq_len=32_768)

    fields = json.loads(their_config.to_json_string(use_diff=False))
    if generation == "rope_scaling":
        del fields["rope_parameters"]
        fields |= {"rope_theta": 500_000.0, "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    rope = read_model_config(tmp_path).rope
    ours_F, our_factor = frequencies(32_768, 64, rope)
    np.testing.assert_allclose(ours_F, theirs_F, rtol=1e-6)
    assert our_factor == pytest.approx(factor, rel=1e-12)
    angle = torch.arange(32_768).float()[:, None] * theirs_F[None]
    for ours, theirs in zip(rope_table(32_768, 64, rope), (angle.cos(), angle.sin()), strict=True):
        # Both multiply a position by a frequency in float32, so that an angle of 32,768 is off by about 0.002.
        np.testing.assert_allclose(ours[0, :, 0], factor * theirs, atol=6e-3)
