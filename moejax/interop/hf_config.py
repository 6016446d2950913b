"""Reads a config.json of Hugging Face, of which no field is passed over in silence: it could change every logit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moejax import strict_json
from moejax.config import RopeConfig, check

# Fields that say nothing about the mathematics of the model, whatever their values.
NEUTRAL = frozenset((
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout", "auto_map", "bos_token_id",
    "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id",
    "tokenizer_class", "torch_dtype", "transformers_version", "use_cache"
))  # fmt: skip


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

    def skip(self, name: str) -> None:
        """Passes over a field that says nothing about this architecture."""
        self._take(name)

    def require(self, name: str, value: Any, why: str) -> None:
        """Raises `ConfigError` if the field is there with another value; `why` says what is not supported."""
        found = self._take(name)
        check(
            found is None or found == value,
            f"{self.source} has {name}={shown(found)}, and moejax has {why}; only {shown(value)} can be loaded",
        )

    def rope(self, head_dim: int) -> RopeConfig:
        """Returns the RoPE, from fields of its own or, since transformers 5, from `rope_parameters`."""
        self.require("rope_scaling", None, "no scaling of RoPE")
        parameters = self._take("rope_parameters")
        if parameters is None:
            theta, factor = self.number("rope_theta"), self.number("partial_rotary_factor", default=1.0)
        else:
            check(
                isinstance(parameters, dict),
                f"{self.source} has rope_parameters={shown(parameters)}; it must be an object",
            )
            rope = HfConfig(parameters, self.source)
            rope.require("rope_type", "default", "no scaling of RoPE")
            theta, factor = rope.number("rope_theta"), rope.number("partial_rotary_factor", default=1.0)
            for name, value in (("rope_theta", theta), ("partial_rotary_factor", factor)):
                self.require(name, value, f"one RoPE, whose {name} is {value} in rope_parameters")
            rope.finish()
        rotary_dim = self.number("rotary_dim", default=int(head_dim * factor))
        return RopeConfig(float(theta), 0 if rotary_dim == head_dim else rotary_dim)

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
