"""What several families have in common: rows of tensors, and fields of config.json both ways."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from moejax.config import AttentionConfig, AttentionKind, LatentConfig, ModelConfig, RouterConfig
from moejax.interop.hf_config import HfConfig
from moejax.interop.rope import read_multiplier, read_rope, write_rope
from moejax.interop.rows import Row

LAYER = "model.layers.{layer}."
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
Fields = dict[str, Any]


def attention_rows(where: str, m: ModelConfig, *, neighbors: int = 0) -> tuple[Row, ...]:
    """Returns the rows of attention and its norm, in the group `where` of layers.

    `neighbors` is how many dims of a head are rotated, if the checkpoint's RoPE pairs neighbors.
    """
    own, theirs = f"{where}.attention.", LAYER + "self_attn."
    rows = [
        Row(own + "norm_D", LAYER + "input_layernorm.weight", "D"),
        Row(own + "w_o_NHD", theirs + "o_proj.weight", "D (N H)"),
        *_HEADS[m.attention.kind](own, theirs, m, neighbors),
    ]
    if m.attention.output_bias:
        rows += [Row(own + "b_o_D", theirs + "o_proj.bias", "D")]
    return tuple(rows)


def _grouped_rows(own: str, theirs: str, m: ModelConfig, neighbors: int) -> list[Row]:
    """Returns the rows of queries, keys and values."""
    rows = [
        Row(own + "w_q_DNH", theirs + "q_proj.weight", "(N H) D", neighbors=neighbors),
        Row(own + "w_kv_DGKH", theirs + "k_proj.weight", "(K H) D", part=0, neighbors=neighbors),
        Row(own + "w_kv_DGKH", theirs + "v_proj.weight", "(K H) D", part=1),
    ]
    if m.attention.bias:
        rows += [
            Row(own + "b_q_NH", theirs + "q_proj.bias", "(N H)", neighbors=neighbors),
            Row(own + "b_kv_GKH", theirs + "k_proj.bias", "(K H)", part=0, neighbors=neighbors),
            Row(own + "b_kv_GKH", theirs + "v_proj.bias", "(K H)", part=1),
        ]
    if m.attention.qk_norm == "head":
        rows += [Row(f"{own}norm_{x}_H", f"{theirs}{x}_norm.weight", "H") for x in ("q", "k")]
    if m.attention.qk_norm == "projection":
        rows += [
            Row(own + "norm_q_NH", theirs + "q_norm.weight", "(N H)"),
            Row(own + "norm_k_KH", theirs + "k_norm.weight", "(K H)"),
        ]
    return rows


def _latent_rows(own: str, theirs: str, m: ModelConfig, neighbors: int) -> list[Row]:
    """Returns the rows of what makes latents, and queries, keys and values of them."""
    if m.attention.latent.q_rank:
        queries = [
            Row(own + "w_q_down_DQ", theirs + "q_a_proj.weight", "Q D"),
            Row(own + "norm_q_Q", theirs + "q_a_layernorm.weight", "Q"),
            Row(own + "w_q_up_QNH", theirs + "q_b_proj.weight", "(N H) Q", neighbors=neighbors),
        ]
    else:
        queries = [Row(own + "w_q_DNH", theirs + "q_proj.weight", "(N H) D", neighbors=neighbors)]
    return [
        *queries,
        Row(own + "w_kv_down_DJ", theirs + "kv_a_proj_with_mqa.weight", "J D", neighbors=neighbors),
        Row(own + "norm_kv_C", theirs + "kv_a_layernorm.weight", "C"),
        Row(own + "w_kv_up_CNH", theirs + "kv_b_proj.weight", "(N H) C"),
    ]


_HEADS: dict[AttentionKind, Callable[[str, str, ModelConfig, int], list[Row]]] = {
    "grouped": _grouped_rows,
    "latent": _latent_rows,
}


def swiglu_rows(own: str, theirs: str) -> tuple[Row, ...]:
    """Returns the rows of a SwiGLU that every token visits."""
    return (
        Row(own + "w_in_DGF", theirs + "gate_proj.weight", "F D", part=0),
        Row(own + "w_in_DGF", theirs + "up_proj.weight", "F D", part=1),
        Row(own + "w_out_FD", theirs + "down_proj.weight", "D F"),
    )


def common_rows(m: ModelConfig, *, neighbors: int = 0) -> tuple[Row, ...]:
    """Returns the rows of all but the router and the experts, as in Llama; `neighbors` as for attention."""
    rows = [
        Row("embed.table_VD", EMBEDDING, "V D"),
        *attention_rows("layers", m, neighbors=neighbors),
        Row("layers.moe_norm_D", LAYER + "post_attention_layernorm.weight", "D"),
        Row("head.norm_D", "model.norm.weight", "D"),
    ]
    if not m.tie_embeddings:
        rows += [Row("head.w_DV", OUTPUT, "V D")]
    if m.num_dense_layers:
        rows += [
            *attention_rows("dense_layers", m, neighbors=neighbors),
            Row("dense_layers.feed_forward_norm_D", LAYER + "post_attention_layernorm.weight", "D"),
            *swiglu_rows("dense_layers.feed_forward.", LAYER + "mlp."),
        ]
    return tuple(rows)


def expert_rows(block: str, names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")) -> tuple[Row, ...]:
    """Returns the rows of the router and of experts that have a tensor each; `names` are of gate, up and down."""
    gate, up, down = (f"{LAYER}{block}.experts.{{expert}}.{name}.weight" for name in names)
    return (
        Row("layers.moe.w_router_DE", f"{LAYER}{block}.gate.weight", "E D"),
        Row("layers.moe.experts.w_in_EDGF", gate, "F D", part=0),
        Row("layers.moe.experts.w_in_EDGF", up, "F D", part=1),
        Row("layers.moe.experts.w_out_EFD", down, "D F"),
    )


def deepseek_rows(
    m: ModelConfig, *, bias: tuple[str, str] = ("mlp.gate.e_score_correction_bias", "E"), neighbors: int = 0
) -> tuple[Row, ...]:
    """Returns all rows, with DeepSeek's names of the router, its selection bias, the experts and the shared expert.

    `bias` is the name and the dims of the selection bias on disk; `neighbors` as for attention.
    """
    selection_bias = [Row("layers.moe.router_bias_E", LAYER + bias[0], bias[1])] if m.router.bias else []
    shared = swiglu_rows("layers.moe.shared.", LAYER + "mlp.shared_experts.") if m.shared_d_ff else ()
    return (*common_rows(m, neighbors=neighbors), *expert_rows("mlp"), *selection_bias, *shared)


# Fields of config.json.


def read_common(
    c: HfConfig, *, rotated: float = 1.0, tied: bool = False, theta: float | None = None, rotary_dim: int = 0,
    **attention: Any,
) -> Fields:  # fmt: skip
    """Returns the fields of `ModelConfig` that every family says alike; `attention` has others of attention.

    `rotated`, `tied` and `theta` are the family's defaults: the part of a head that RoPE rotates, tied embeddings, and
    RoPE's base. `rotary_dim` is of a family that has a field of it.
    """
    c.require("use_sliding_window", False, "no window of attention")
    c.require("use_mrope", False, "positions of one dimension")
    c.skip("max_window_layers")  # says nothing without use_sliding_window
    width, heads = c.count("hidden_size"), c.count("num_attention_heads")
    head_dim = c.count("head_dim", default=width // heads)
    return _read_sizes(c, tied) | {
        "attention": AttentionConfig(heads, c.number("num_key_value_heads", default=heads), head_dim, **attention),
        "rope": read_rope(c, head_dim, rotated, theta, rotary_dim),
    }


def read_common_latent(c: HfConfig) -> Fields:
    """Returns what `read_common` does, of a family with latent attention."""
    heads, rotated = c.count("num_attention_heads"), c.count("qk_rope_head_dim")
    head_dim = c.count("qk_nope_head_dim") + rotated
    latent = LatentConfig(c.count("kv_lora_rank"), c.number("q_lora_rank", default=0), rotated, c.count("v_head_dim"))
    c.require("num_key_value_heads", heads, "keys and values of its own for each head here")
    c.require("attention_bias", False, "no biases in latent attention")
    c.require("rope_interleave", True, "RoPE that rotates neighbors here")
    # Newer versions of transformers write the sizes again.
    c.require("qk_head_dim", head_dim, "heads of qk_nope_head_dim + qk_rope_head_dim")
    c.require("head_dim", rotated, "qk_rope_head_dim by this name")
    rope = read_rope(c, rotated)
    attention = AttentionConfig(heads, heads, head_dim, multiplier=read_multiplier(c, head_dim), latent=latent)
    return _read_sizes(c, tied=False) | {"attention": attention, "rope": rope}


def _read_sizes(c: HfConfig, tied: bool) -> Fields:
    c.require("hidden_act", "silu", "only SiLU experts")
    return {
        "d_model": c.number("hidden_size"),
        "num_layers": c.number("num_hidden_layers"),
        "vocab_size": c.number("vocab_size"),
        "max_seq_len": c.number("max_position_embeddings"),
        "norm_eps": float(c.number("rms_norm_eps")),
        "tie_embeddings": c.flag("tie_word_embeddings", default=tied),
    }


def write_common(m: ModelConfig) -> Fields:
    """Returns the fields of config.json that every family has under the same names."""
    return {
        "hidden_size": m.d_model,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.attention.num_heads,
        "num_key_value_heads": m.attention.num_kv_heads,
        **(_write_latent(m) if m.attention.kind == "latent" else _write_grouped(m)),
        "hidden_act": "silu",
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.max_seq_len,
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
        "attention_dropout": 0.0,
    }


def _write_grouped(m: ModelConfig) -> Fields:
    return {"head_dim": m.attention.head_dim, **write_rope(m.rope, m.attention.head_dim)}


def _write_latent(m: ModelConfig) -> Fields:
    a, latent = m.attention, m.attention.latent
    return {
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.q_rank or None,
        "qk_nope_head_dim": a.head_dim - latent.rope_head_dim,
        "qk_rope_head_dim": latent.rope_head_dim,
        "v_head_dim": latent.value_head_dim,
        **write_rope(m.rope, latent.rope_head_dim, multiplier=a.multiplier * a.head_dim**0.5),
    }


def read_biases(c: HfConfig) -> dict[str, bool]:
    """Returns the biases of attention, which one field says for all four projections."""
    bias = c.flag("attention_bias", default=False)
    return {"bias": bias, "output_bias": bias}


# Qwen's patterns of layers without experts, of which moejax has none.
EVERY_LAYER: Fields = {"decoder_sparse_step": 1, "mlp_only_layers": []}


def require_experts_in_every_layer(c: HfConfig) -> None:
    """Refuses Qwen's patterns of layers without experts."""
    for name, value in EVERY_LAYER.items():
        c.require(name, value, "experts in every layer")


def require_full_attention(c: HfConfig) -> None:
    """Refuses windows of attention in some layers."""
    c.require("layer_types", ["full_attention"] * c.count("num_hidden_layers"), "no window of attention")


def read_sigmoid_router(c: HfConfig, *, renormalize: bool) -> RouterConfig:
    """Returns the router of DeepSeek-V3, which GLM-4.5, dots1 and others also have; `renormalize` is a default."""
    c.choice("scoring_func", of=("sigmoid", "noaux_tc"), default="sigmoid")  # two names for the same thing
    c.require("topk_method", "noaux_tc", "a selection bias here")
    return RouterConfig(
        "sigmoid", c.flag("norm_topk_prob", renormalize), bias=True,
        scaling=float(c.number("routed_scaling_factor", default=1.0)),
        num_groups=c.count("n_group", default=1), groups_per_token=c.count("topk_group", default=1),
    )  # fmt: skip


def read_deepseek(c: HfConfig, common: Fields, router: RouterConfig) -> ModelConfig:
    """Reads DeepSeek's layers, which GLM-4.5, dots1 and others also have; `common` and `router` are read already."""
    c.require("moe_layer_freq", 1, "experts in every layer after the dense ones")
    c.skip("num_nextn_predict_layers")  # those layers are left out
    dense, width = c.number("first_k_dense_replace", default=0), c.number("moe_intermediate_size")
    dense_d_ff = c.number("intermediate_size", default=0)
    return ModelConfig(
        **common,
        d_ff=width,
        num_experts=c.number("n_routed_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
        router=router,
        shared_d_ff=c.number("n_shared_experts") * width,
        num_dense_layers=dense,
        dense_d_ff=dense_d_ff if dense else 0,
    )


def write_deepseek(m: ModelConfig) -> Fields:
    """Writes what `read_deepseek` reads."""
    return write_common(m) | {
        "attention_bias": m.attention.bias,
        "moe_intermediate_size": m.d_ff,
        "n_routed_experts": m.num_experts,
        "n_shared_experts": m.shared_d_ff // m.d_ff,
        "num_experts_per_tok": m.experts_per_token,
        "norm_topk_prob": m.router.renormalize,
        "routed_scaling_factor": m.router.scaling,
        "n_group": m.router.num_groups,
        "topk_group": m.router.groups_per_token,
        "first_k_dense_replace": m.num_dense_layers,
        "intermediate_size": m.dense_d_ff or m.d_ff,
    }
