"""Families: the architectures of Hugging Face whose checkpoints moejax reads and writes.

A family is a few functions beside each other: config.json -> `ModelConfig`, back again, and the rows of its tensors
(`moejax.interop.rows`). `FAMILIES` has them by the `model_type` that config.json says.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moejax.checks import ConfigError, check
from moejax.config import ModelConfig, RouterConfig
from moejax.interop.common import (
    EVERY_LAYER,
    LAYER,
    Fields,
    common_rows,
    deepseek_rows,
    expert_rows,
    read_biases,
    read_common,
    read_common_latent,
    read_deepseek,
    read_sigmoid_router,
    require_experts_in_every_layer,
    require_full_attention,
    swiglu_rows,
    write_common,
    write_deepseek,
)
from moejax.interop.hf_config import HfConfig, shown
from moejax.interop.rows import Row
from moejax.overrides import describe


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture: its names at Hugging Face, its configuration both ways, and its tensors.

    `ignored` are patterns of stored names that are left out on purpose: layers that only predict further tokens.
    `made` are parameters that no tensor has.
    `written_as` returns the model that is written in place of another that computes the same.
    """

    model_type: str
    architecture: str
    read_config: Callable[[HfConfig], ModelConfig]
    write_config: Callable[[ModelConfig], Fields]
    rows: Callable[[ModelConfig], tuple[Row, ...]]
    ignored: Callable[[ModelConfig], tuple[str, ...]] = lambda m: ()
    written_as: Callable[[ModelConfig], ModelConfig] = lambda m: m
    made: tuple[str, ...] = ()


def _read_dense(c: HfConfig, **attention: Any) -> ModelConfig:
    """Reads a model without experts, which is one with a single expert for every token."""
    c.require("mlp_bias", False, "no biases in feed-forwards")
    c.require("pretraining_tp", 1, "one order of sums")
    require_full_attention(c)
    width = c.number("intermediate_size")
    return ModelConfig(**read_common(c, **attention), d_ff=width, num_experts=1, experts_per_token=1)


def _write_dense(m: ModelConfig) -> Fields:
    return write_common(m) | {"intermediate_size": m.d_ff}


def _dense_rows(m: ModelConfig) -> tuple[Row, ...]:
    return (
        *common_rows(m),
        Row("layers.moe.experts.w_in_EDGF", LAYER + "mlp.gate_proj.weight", "F D", part=0),
        Row("layers.moe.experts.w_in_EDGF", LAYER + "mlp.up_proj.weight", "F D", part=1),
        Row("layers.moe.experts.w_out_EFD", LAYER + "mlp.down_proj.weight", "D F"),
    )


def _read_llama(c: HfConfig) -> ModelConfig:
    c.skip("is_llama_config")  # SmolLM2 says so
    c.require("rope_interleaved", False, "RoPE that rotates halves of a head")
    return _read_dense(c, theta=10_000.0, **read_biases(c))  # Llama 2 has no field of it


def _write_llama(m: ModelConfig) -> Fields:
    return _write_dense(m) | {"attention_bias": m.attention.bias, "mlp_bias": False}


def _read_dense_qwen2(c: HfConfig) -> ModelConfig:
    c.skip("sliding_window")  # says nothing without use_sliding_window
    return _read_dense(c, bias=True)


def _read_dense_qwen3(c: HfConfig) -> ModelConfig:
    c.skip("sliding_window")  # says nothing without use_sliding_window
    return _read_dense(c, qk_norm="head", **read_biases(c))


def _write_dense_qwen3(m: ModelConfig) -> Fields:
    return _write_dense(m) | {"attention_bias": m.attention.bias}


def _read_mixtral(c: HfConfig) -> ModelConfig:
    c.require("sliding_window", None, "no window of attention")
    c.require("router_jitter_noise", 0.0, "no noise in the router")
    return ModelConfig(
        **read_common(c),
        d_ff=c.number("intermediate_size"),
        num_experts=c.number("num_local_experts", "num_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
    )


def _write_mixtral(m: ModelConfig) -> Fields:
    return write_common(m) | {
        "intermediate_size": m.d_ff,
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


def _read_olmoe(c: HfConfig) -> ModelConfig:
    c.require("clip_qkv", None, "no clipping of queries, keys and values")
    return ModelConfig(
        **read_common(c, qk_norm="projection", **read_biases(c)),
        d_ff=c.number("intermediate_size"),
        num_experts=c.number("num_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
        router=RouterConfig(renormalize=c.flag("norm_topk_prob", default=False)),
    )


def _write_olmoe(m: ModelConfig) -> Fields:
    return write_common(m) | {
        "intermediate_size": m.d_ff,
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "norm_topk_prob": m.router.renormalize,
        "attention_bias": m.attention.bias,
        "clip_qkv": None,
    }


def _read_qwen3(c: HfConfig) -> ModelConfig:
    require_experts_in_every_layer(c)
    c.require("sliding_window", None, "no window of attention")
    c.skip("intermediate_size")  # of dense layers, of which there are none
    return ModelConfig(
        **read_common(c, qk_norm="head", **read_biases(c)),
        d_ff=c.number("moe_intermediate_size"),
        num_experts=c.number("num_local_experts", "num_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
        router=RouterConfig(renormalize=c.flag("norm_topk_prob", default=False)),
    )


def _write_qwen3(m: ModelConfig) -> Fields:
    return write_common(m) | {
        "moe_intermediate_size": m.d_ff,
        "intermediate_size": m.d_ff,
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "norm_topk_prob": m.router.renormalize,
        "attention_bias": m.attention.bias,
        **EVERY_LAYER,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _read_qwen2(c: HfConfig) -> ModelConfig:
    require_experts_in_every_layer(c)
    c.skip("intermediate_size")  # of dense layers, of which there are none
    c.skip("sliding_window")  # says nothing without use_sliding_window
    require_full_attention(c)
    return ModelConfig(
        **read_common(c, bias=c.flag("qkv_bias", default=True)),
        d_ff=c.number("moe_intermediate_size"),
        num_experts=c.number("num_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
        router=RouterConfig(renormalize=c.flag("norm_topk_prob", default=False)),
        shared_d_ff=c.number("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _write_qwen2(m: ModelConfig) -> Fields:
    return write_common(m) | {
        "moe_intermediate_size": m.d_ff,
        "intermediate_size": m.d_ff,
        "shared_expert_intermediate_size": m.shared_d_ff,
        "num_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "norm_topk_prob": m.router.renormalize,
        "qkv_bias": m.attention.bias,
        **EVERY_LAYER,
        "use_sliding_window": False,
    }


def _qwen2_rows(m: ModelConfig) -> tuple[Row, ...]:
    return (
        *common_rows(m),
        *expert_rows("mlp"),
        *swiglu_rows("layers.moe.shared.", LAYER + "mlp.shared_expert."),
        Row("layers.moe.shared.w_gate_D", LAYER + "mlp.shared_expert_gate.weight", "1 D"),
    )


def _read_glm4(c: HfConfig) -> ModelConfig:
    qk_norm = "head" if c.flag("use_qk_norm", default=False) else "none"
    common = read_common(c, rotated=0.5, qk_norm=qk_norm, bias=c.flag("attention_bias", default=False))
    return read_deepseek(c, common, read_sigmoid_router(c, renormalize=True))


def _write_glm4(m: ModelConfig) -> Fields:
    return write_deepseek(m) | {
        "use_qk_norm": m.attention.qk_norm == "head",
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": m.rotary_dim / m.attention.head_dim,
    }


def _read_solar(c: HfConfig) -> ModelConfig:
    c.require("first_k_dense_replace", 0, "experts in every layer here")
    c.require("use_qk_norm", False, "no norms of queries and keys here")
    common = read_common(c, bias=c.flag("attention_bias", default=False))
    return read_deepseek(c, common, read_sigmoid_router(c, renormalize=True))


def _read_dots1(c: HfConfig) -> ModelConfig:
    if c.value("layer_types") is None and c.value("sliding_window", 4096) is not None:
        # Layers from max_window_layers on have the window.
        layers, full = c.count("num_hidden_layers"), c.number("max_window_layers", default=62)
        check(
            full >= layers,
            f"{c.source} has max_window_layers={full}, and moejax has no window of attention; only {layers} or more "
            "can be loaded",
        )
    require_full_attention(c)
    c.skip("sliding_window")  # no layer has it
    common = read_common(c, qk_norm="head", **read_biases(c))
    return read_deepseek(c, common, read_sigmoid_router(c, renormalize=False))


def _write_dots1(m: ModelConfig) -> Fields:
    return write_deepseek(m) | {"layer_types": ["full_attention"] * m.num_layers}


def _skip_deepseeks_training(c: HfConfig) -> None:
    """Passes over what DeepSeek's files and Kimi's say of how the model was trained."""
    c.require("pretraining_tp", 1, "one order of sums")
    for name in ("aux_loss_alpha", "seq_aux", "ep_size"):
        c.skip(name)


def _read_deepseek_v3(c: HfConfig) -> ModelConfig:
    _skip_deepseeks_training(c)
    for name in ("n_group", "topk_group", "routed_scaling_factor"):
        c.number(name)  # must be there: transformers' defaults are DeepSeek-V3's own, other families' say nothing
    return read_deepseek(c, read_common_latent(c), read_sigmoid_router(c, renormalize=True))


def _write_deepseek_v3(m: ModelConfig) -> Fields:
    return write_deepseek(m) | {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
    }


def _read_deepseek_v2(c: HfConfig) -> ModelConfig:
    _skip_deepseeks_training(c)
    c.require("mlp_bias", False, "no biases in feed-forwards")
    c.require("scoring_func", "softmax", "a softmax here")
    c.require("norm_topk_prob", False, "gates as they are here")
    limited = c.choice("topk_method", of=("greedy", "group_limited_greedy"), default="greedy") != "greedy"
    groups = [c.count(name, default=1) for name in ("n_group", "topk_group")]  # say nothing without a limit
    router = RouterConfig(
        renormalize=False, scaling=float(c.number("routed_scaling_factor", default=1.0)),
        num_groups=groups[0] if limited else 1, groups_per_token=groups[1] if limited else 1,
    )  # fmt: skip
    width, heads = c.count("hidden_size"), c.count("num_attention_heads")
    check(
        width % heads == 0,
        f"{c.source} has hidden_size={width}, which transformers wants to be a multiple of num_attention_heads={heads}",
    )
    return read_deepseek(c, read_common_latent(c), router)


def _write_deepseek_v2(m: ModelConfig) -> Fields:
    return write_deepseek(m) | {
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if m.router.num_groups > 1 else "greedy",
        "moe_layer_freq": 1,
    }


def _deepseek_rows(m: ModelConfig) -> tuple[Row, ...]:
    return deepseek_rows(m, neighbors=m.rotary_dim)


def _read_minimax_m2(c: HfConfig) -> ModelConfig:
    c.require("router_jitter_noise", 0.0, "no noise in the router")
    c.require("use_qk_norm", True, "norms of queries and keys here")
    c.require("qk_norm_type", "per_layer", "norms over all heads here")
    c.require("scoring_func", "sigmoid", "a sigmoid here")
    c.require("use_routing_bias", True, "a selection bias here")
    c.require("sliding_window", None, "no window of attention")
    c.require("attn_type_list", [1] * c.count("num_hidden_layers"), "softmax attention in every layer")
    c.require("shared_intermediate_size", 0, "no shared expert here")
    for name in ("full_attention", "linear_attention", "mlp"):
        c.require(f"layernorm_{name}_beta", 1.0, "residuals as they are")
    # The rest says nothing without a shared expert or dense layers, or is of layers that are left out.
    for name in ("shared_moe_mode", "mlp_intermediate_size", "use_mtp", "num_mtp_modules", "mtp_transformer_layers"):
        c.skip(name)
    return ModelConfig(
        **read_common(c, qk_norm="projection", rotary_dim=int(c.number("rotary_dim", default=0))),
        d_ff=c.number("intermediate_size"),
        num_experts=c.number("num_local_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
        router=RouterConfig("sigmoid", bias=True),
    )


def _write_minimax_m2(m: ModelConfig) -> Fields:
    return write_common(m) | {
        "intermediate_size": m.d_ff,
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "router_jitter_noise": 0.0,
        "rotary_dim": m.rotary_dim,
    }


def _minimax_m2_rows(m: ModelConfig) -> tuple[Row, ...]:
    bias = Row("layers.moe.router_bias_E", LAYER + "block_sparse_moe.e_score_correction_bias", "E")
    return (*common_rows(m), *expert_rows("block_sparse_moe", ("w1", "w3", "w2")), bias)


def _read_granite(c: HfConfig) -> ModelConfig:
    multiplier = float(c.number("attention_multiplier", default=1.0))
    check(multiplier > 0, f"{c.source} has attention_multiplier={multiplier}; it must be positive")
    return ModelConfig(
        **read_common(c, multiplier=multiplier, **read_biases(c)),
        d_ff=c.number("intermediate_size"),
        num_experts=c.number("num_local_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
        embedding_multiplier=float(c.number("embedding_multiplier", default=1.0)),
        residual_multiplier=float(c.number("residual_multiplier", default=1.0)),
        logits_divisor=float(c.number("logits_scaling", default=1.0)),
    )


def _write_granite(m: ModelConfig) -> Fields:
    return write_common(m) | {
        "intermediate_size": m.d_ff,
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "attention_bias": m.attention.bias,
        "attention_multiplier": m.attention.multiplier,
        "embedding_multiplier": m.embedding_multiplier,
        "residual_multiplier": m.residual_multiplier,
        "logits_scaling": m.logits_divisor,
    }


def _granite_rows(m: ModelConfig) -> tuple[Row, ...]:
    block = LAYER + "block_sparse_moe."
    return (
        *common_rows(m),
        Row("layers.moe.w_router_DE", block + "router.layer.weight", "E D"),
        Row("layers.moe.experts.w_in_EDGF", block + "input_linear.weight", "E (G F) D"),
        Row("layers.moe.experts.w_out_EFD", block + "output_linear.weight", "E D F"),
    )


def _read_ernie(c: HfConfig) -> ModelConfig:
    c.require("use_bias", False, "no biases here")
    c.require("moe_layer_interval", 1, "experts in every layer after the dense ones")
    c.require("moe_norm_min", 1e-12, "no other bound of the sum of gates")
    c.require("moe_gate", "topk", "no other router")
    c.require("moe_use_aux_free", True, "a selection bias here")
    c.require("use_rmsnorm", True, "no other norms")
    c.require("compression_ratio", 1.0, "positions as they are")
    c.skip("moe_capacity")  # of PaddlePaddle's training
    c.skip("num_nextn_predict_layers")  # those layers are left out
    layers, dense = c.number("num_hidden_layers"), c.number("moe_layer_start_index")
    if c.number("moe_layer_end_index", default=-1) != -1:
        c.require("moe_layer_end_index", layers - 1, "experts in every layer after the dense ones")
    width, dense_d_ff = c.number("moe_intermediate_size"), c.number("intermediate_size")
    return ModelConfig(
        **read_common(c, tied=True),
        d_ff=width,
        num_experts=c.number("moe_num_experts"),
        experts_per_token=c.number("moe_k"),
        router=RouterConfig(bias=True),
        shared_d_ff=c.number("moe_num_shared_experts", default=0) * width,
        num_dense_layers=dense,
        dense_d_ff=dense_d_ff if dense else 0,
    )


def _write_ernie(m: ModelConfig) -> Fields:
    return write_common(m) | {
        "use_bias": False,
        "intermediate_size": m.dense_d_ff or m.d_ff,
        "moe_intermediate_size": m.d_ff,
        "moe_num_experts": m.num_experts,
        "moe_k": m.experts_per_token,
        "moe_num_shared_experts": m.shared_d_ff // m.d_ff,
        "moe_layer_start_index": m.num_dense_layers,
        "moe_layer_end_index": m.num_layers - 1,
        "moe_layer_interval": 1,
        "moe_norm_min": 1e-12,
    }


def _ernie_rows(m: ModelConfig) -> tuple[Row, ...]:
    return deepseek_rows(m, bias=("mlp.moe_statics.e_score_correction_bias", "1 E"), neighbors=m.rotary_dim)


def _beyond_last_layer(m: ModelConfig) -> tuple[str, ...]:
    return (f"model.layers.{m.num_layers}.*",)


def _mtp(m: ModelConfig) -> tuple[str, ...]:
    return ("model.mtp*",)


def _with_shared_expert(m: ModelConfig) -> ModelConfig:
    """Returns the model with a shared expert: if it has none, one of zeros, which adds nothing to any token."""
    return m if m.shared_d_ff else dataclasses.replace(m, shared_d_ff=m.d_ff)


def _with_gated_shared_expert(m: ModelConfig) -> ModelConfig:
    return m if m.shared_d_ff else dataclasses.replace(m, shared_d_ff=m.d_ff, shared_gate=True)


def _with_attention_multiplier(m: ModelConfig) -> ModelConfig:
    """Returns the model with the default attention scale written out."""
    scale = m.attention.multiplier or m.attention.head_dim**-0.5
    return dataclasses.replace(m, attention=dataclasses.replace(m.attention, multiplier=scale))


_ROUTER = ("layers.moe.w_router_DE",)  # which a dense model has no use for

# A model is written as the first that expresses it.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "llama", "LlamaForCausalLM", _read_llama, _write_llama, _dense_rows, made=_ROUTER
        ),
        Family(
            "qwen2", "Qwen2ForCausalLM", _read_dense_qwen2, _write_dense, _dense_rows, made=_ROUTER
        ),
        Family(
            "qwen3", "Qwen3ForCausalLM", _read_dense_qwen3, _write_dense_qwen3, _dense_rows,
            made=_ROUTER,
        ),
        Family(
            "mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral,
            lambda m: common_rows(m) + expert_rows("block_sparse_moe", ("w1", "w3", "w2")),
        ),
        Family(
            "qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3, _write_qwen3,
            lambda m: common_rows(m) + expert_rows("mlp"),
        ),
        Family("olmoe", "OlmoeForCausalLM", _read_olmoe, _write_olmoe, lambda m: common_rows(m) + expert_rows("mlp")),
        Family(
            "qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2, _write_qwen2, _qwen2_rows,
            written_as=_with_gated_shared_expert,
        ),
        Family(
            "glm4_moe", "Glm4MoeForCausalLM", _read_glm4, _write_glm4, deepseek_rows, _beyond_last_layer,
            _with_shared_expert,
        ),
        Family("dots1", "Dots1ForCausalLM", _read_dots1, _write_dots1, deepseek_rows),
        Family("solar_open", "SolarOpenForCausalLM", _read_solar, write_deepseek, deepseek_rows),
        *(
            Family(
                name, "DeepseekV3ForCausalLM", _read_deepseek_v3, _write_deepseek_v3, _deepseek_rows,
                _beyond_last_layer, _with_shared_expert,
            )
            for name in ("deepseek_v3", "kimi_k2")  # the same by two names
        ),
        Family(
            "deepseek_v2", "DeepseekV2ForCausalLM", _read_deepseek_v2, _write_deepseek_v2, _deepseek_rows,
            _beyond_last_layer, _with_shared_expert,
        ),
        Family("minimax_m2", "MiniMaxM2ForCausalLM", _read_minimax_m2, _write_minimax_m2, _minimax_m2_rows, _mtp),
        Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", _read_ernie, _write_ernie, _ernie_rows, _mtp),
        Family(
            "granitemoe", "GraniteMoeForCausalLM", _read_granite, _write_granite, _granite_rows,
            written_as=_with_attention_multiplier,
        ),
    )
}  # fmt: skip


def find_family(fields: Mapping[str, Any], source: Path) -> Family:
    """Returns the family of a config.json with these fields.

    Raises:
      ConfigError: moejax has no rows for its `model_type`.
    """
    model_type = fields.get("model_type")
    check(
        isinstance(model_type, str) and model_type in FAMILIES,
        f"{source} has model_type={shown(model_type)}; moejax reads {', '.join(sorted(FAMILIES))}",
    )
    return FAMILIES[str(model_type)]


def differences(m: ModelConfig, other: ModelConfig, *, without: frozenset[str]) -> list[str]:
    """Returns the fields in which two models differ, as "rope.theta=1.0 (not 2.0)" with the value of `m` first."""
    pairs = zip(describe(m), describe(other), strict=True)
    return [f"{a.path}={a.text} (not {b.text})" for a, b in pairs if a.text != b.text and a.path not in without]


def family_to_write(m: ModelConfig) -> tuple[Family, ModelConfig]:
    """Returns the first family that expresses the model exactly, and the model as it is written.

    Raises:
      ConfigError: none does; the message says what the nearest one lacks.
    """
    lacks: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        try:
            written = family.written_as(m)
            read = family.read_config(HfConfig(family.write_config(written), Path("config.json")))
        except ConfigError:
            continue
        lacks[family.model_type] = differences(written, read, without=frozenset({"dtype"}))
        if not lacks[family.model_type]:
            return family, written
    nearest = min(lacks, key=lambda name: len(lacks[name]))
    raise ConfigError(
        f"none of {', '.join(FAMILIES)} has a model like this, so it cannot be written for transformers; {nearest} "
        f"lacks {', '.join(lacks[nearest])}"
    )
