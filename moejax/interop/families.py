"""Families: the architectures of Hugging Face whose checkpoints moejax reads and writes.

A family is a few functions beside each other: config.json -> `ModelConfig`, back again, and the rows of its tensors
(`moejax.interop.rows`). `FAMILIES` has them by the `model_type` that config.json says.

Every field of a config.json is understood, known not to change the model, or an error that names it: a field that was
passed over could change every logit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moejax import strict_json
from moejax.config import ConfigError, ModelConfig, check
from moejax.interop.rows import Row

# Fields that say nothing about the mathematics of the model, whatever their values.
NEUTRAL = frozenset((
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"
))  # fmt: skip
LAYER = "model.layers.{layer}."


def shown(value: Any) -> str:
    """Returns the beginning of a value as config.json has it."""
    text = strict_json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


class HfConfig:
    """The fields of a config.json, each of which must be asked for; `finish` names those that were not."""

    def __init__(self, fields: Mapping[str, Any], source: Path) -> None:
        self.fields = dict(fields)
        self.source = source
        self._unread = set(fields) - NEUTRAL

    def number(self, *names: str, default: float | None = None) -> Any:
        """Returns the field, under whichever of its names it has.

        Raises:
          ConfigError: the field is not there and has no default, or is no number.
        """
        value = self._take(*names)
        if value is None:
            check(default is not None, f"{self.source} lacks {' or '.join(names)}")
            return default
        check(
            isinstance(value, int | float) and not isinstance(value, bool),
            f"{self.source} has {names[0]}={shown(value)}; it must be a number",
        )
        return value

    def flag(self, name: str, default: bool) -> bool:
        """Returns a field that is true or false."""
        value = self._take(name)
        value = default if value is None else value
        check(isinstance(value, bool), f"{self.source} has {name}={shown(value)}; it must be true or false")
        return value

    def require(self, name: str, value: Any, why: str) -> None:
        """Raises `ConfigError` if the field is there with another value; `why` says what is not supported."""
        found = self._take(name)
        check(
            found is None or found == value,
            f"{self.source} has {name}={shown(found)}, and moejax has {why}; only {shown(value)} can be loaded",
        )

    def rope_theta(self) -> float:
        """Returns the base of RoPE, from `rope_theta` or, since transformers 5, `rope_parameters`."""
        self.require("rope_scaling", None, "no scaling of RoPE")
        parameters = self._take("rope_parameters")
        if parameters is None:
            return float(self.number("rope_theta"))
        check(
            isinstance(parameters, dict), f"{self.source} has rope_parameters={shown(parameters)}; it must be an object"
        )
        rope = HfConfig(parameters, self.source)
        rope.require("rope_type", "default", "no scaling of RoPE")
        theta = float(rope.number("rope_theta"))
        self.require("rope_theta", theta, f"one base of RoPE, which rope_parameters say is {theta}")
        rope.finish()
        return theta

    def finish(self) -> None:
        """Raises `ConfigError` for the fields that nothing asked for."""
        unread = sorted(self._unread)
        check(
            not unread,
            f"{self.source} has fields that moejax does not know for this architecture and that may change the model: "
            + ", ".join(f"{name}={shown(self.fields[name])}" for name in unread[:6]),
        )

    def _take(self, *names: str) -> Any:
        found = [name for name in names if name in self.fields]
        self._unread -= set(found)
        values = [self.fields[name] for name in found]
        differ = " and ".join(f"{name}={shown(self.fields[name])}" for name in found)
        check(all(value == values[0] for value in values), f"{self.source} has {differ}, which are the same field")
        return values[0] if values else None


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture: its names at Hugging Face, its configuration both ways, and its tensors.

    `ignored` are prefixes of stored names that are left out on purpose, such as layers that only predict further
    tokens.
    """

    model_type: str
    architecture: str
    read_config: Callable[[HfConfig], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    rows: Callable[[ModelConfig], tuple[Row, ...]]
    ignored: Callable[[ModelConfig], tuple[str, ...]] = lambda m: ()


def common_rows(m: ModelConfig) -> tuple[Row, ...]:
    """Returns the rows of the embedding, attention, norms and output layer, as in Llama."""
    attention = LAYER + "self_attn."
    head = () if m.tie_embeddings else (Row("head.w_DV", "lm_head.weight", "V D"),)
    return (
        Row("embed.table_VD", "model.embed_tokens.weight", "V D"),
        Row("layers.attention.norm_D", LAYER + "input_layernorm.weight", "D"),
        Row("layers.attention.w_q_DNH", attention + "q_proj.weight", "(N H) D"),
        Row("layers.attention.w_kv_DGKH", attention + "k_proj.weight", "(K H) D", part=0),
        Row("layers.attention.w_kv_DGKH", attention + "v_proj.weight", "(K H) D", part=1),
        Row("layers.attention.w_o_NHD", attention + "o_proj.weight", "D (N H)"),
        Row("layers.moe_norm_D", LAYER + "post_attention_layernorm.weight", "D"),
        Row("head.norm_D", "model.norm.weight", "D"),
        *head,
    )


def expert_rows(block: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Returns the rows of the router and the experts, which have a tensor per expert and projection."""
    experts = f"{LAYER}{block}.experts.{{expert}}."
    return (
        Row("layers.moe.w_router_DE", f"{LAYER}{block}.gate.weight", "E D"),
        Row("layers.moe.experts.w_in_EDGF", f"{experts}{gate}.weight", "F D", part=0),
        Row("layers.moe.experts.w_in_EDGF", f"{experts}{up}.weight", "F D", part=1),
        Row("layers.moe.experts.w_out_EFD", f"{experts}{down}.weight", "D F"),
    )


def common_config(m: ModelConfig) -> dict[str, Any]:
    """Returns the fields of config.json that every family has under the same names."""
    return {
        "hidden_size": m.d_model,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads,
        "head_dim": m.head_dim,
        "hidden_act": "silu",
        "vocab_size": m.vocab_size,
        "max_position_embeddings": m.max_seq_len,
        "rms_norm_eps": m.norm_eps,
        "rope_theta": m.rope_theta,
        "tie_word_embeddings": m.tie_embeddings,
        "attention_dropout": 0.0,
    }


def read_common(c: HfConfig) -> dict[str, Any]:
    """Returns the fields of `ModelConfig` that every family says alike."""
    c.require("hidden_act", "silu", "experts with SiLU alone")
    width, heads = c.number("hidden_size"), c.number("num_attention_heads")
    return {
        "d_model": width,
        "num_layers": c.number("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": c.number("num_key_value_heads"),
        "head_dim": c.number("head_dim", default=width // heads),
        "vocab_size": c.number("vocab_size"),
        "max_seq_len": c.number("max_position_embeddings"),
        "norm_eps": float(c.number("rms_norm_eps")),
        "rope_theta": c.rope_theta(),
        "tie_embeddings": c.flag("tie_word_embeddings", default=False),
    }


def _read_mixtral(c: HfConfig) -> ModelConfig:
    c.require("sliding_window", None, "no window of attention")
    c.require("router_jitter_noise", 0.0, "no noise in the router")
    return ModelConfig(
        **read_common(c),
        d_ff=c.number("intermediate_size"),
        num_experts=c.number("num_local_experts", "num_experts"),
        experts_per_token=c.number("num_experts_per_tok"),
    )


def _write_mixtral(m: ModelConfig) -> dict[str, Any]:
    return common_config(m) | {
        "intermediate_size": m.d_ff,
        "num_local_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "sliding_window": None,
        "router_jitter_noise": 0.0,
    }


MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    _read_mixtral,
    _write_mixtral,
    lambda m: common_rows(m) + expert_rows("block_sparse_moe", "w1", "w3", "w2"),
)

FAMILIES: dict[str, Family] = {family.model_type: family for family in (MIXTRAL,)}


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


def family_to_write(m: ModelConfig) -> Family:
    """Returns the first family that expresses the model exactly.

    Raises:
      ConfigError: none does.
    """
    for family in FAMILIES.values():
        config = HfConfig(family.write_config(m), Path("config.json"))
        try:
            read = family.read_config(config)
        except ConfigError:
            continue
        if dataclasses.replace(read, dtype=m.dtype) == m:
            return family
    raise ConfigError(
        f"no architecture among {', '.join(FAMILIES)} has all of router_score={m.router_score}, router_renormalize="
        f"{m.router_renormalize}, router_bias={m.router_bias}, shared_d_ff={m.shared_d_ff} and num_dense_layers="
        f"{m.num_dense_layers}, so this model cannot be written for transformers"
    )
