"""Reads a config.json of Hugging Face, of which no field is passed over in silence: it could change every logit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from moejax import strict_json
from moejax.checks import check, one_line

# Fields that say nothing about the mathematics of the model, whatever their values.
NEUTRAL = frozenset((
    "_attn_implementation", "_model_name_or_path", "_name_or_path", "architectures", "attention_dropout", "auto_map",
    "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "initializer_range", "is_decoder",
    "is_encoder_decoder", "label2id", "model_type", "output_attentions", "output_hidden_states",
    "output_router_logits", "pad_token_id", "problem_type", "return_dict", "router_aux_loss_coef", "sep_token_id",
    "tokenizer_class", "unk_token_id", "torch_dtype", "transformers_version", "use_cache"
))  # fmt: skip

# Fields of RoPE that some files have beside `rope_scaling` or `rope_parameters`, and others in them.
ROPE_FIELDS = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


def shown(value: Any) -> str:
    """Returns the beginning of a value as config.json has it."""
    text = strict_json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a finite number that a float can hold."""
    return type(value) in (int, float) and abs(value) < 2**63  # a NaN is not less


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
        check(_is_number(value), f"{self.source} has {names[0]}={shown(value)}; it must be a number")
        return value

    def count(self, *names: str, default: int | None = None) -> int:
        """Returns a field that is an integer from 1 to a million."""
        value = self.number(*names, default=default)
        check(
            type(value) is int and 1 <= value <= 1_000_000,
            f"{self.source} has {names[0]}={shown(value)}; it must be an integer from 1 to 1,000,000",
        )
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        """Returns a field that is true or false."""
        value = self._take(name)
        value = default if value is None else value
        check(isinstance(value, bool), f"{self.source} has {name}={shown(value)}; it must be true or false")
        return value

    def value(self, name: str, default: Any = None) -> Any:
        """Returns a field of any kind, None if it is null; `default` if it is not there."""
        self._take(name)
        return self.fields.get(name, default)

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

    def choice(self, *names: str, of: Collection[str], default: str) -> str:
        """Returns a field that is one of a few texts."""
        value = self._take(*names)
        value = default if value is None else value
        check(
            isinstance(value, str) and value in of,
            f"{self.source} has {names[0]}={shown(value)}, and moejax has only {', '.join(of)}",
        )
        return str(value)

    def numbers(self, name: str) -> tuple[float, ...]:
        """Returns a list of numbers."""
        values = self._take(name)
        ok = isinstance(values, list) and all(map(_is_number, values))
        check(ok, f"{self.source} has {name}={shown(values)}; it must be a list of numbers")
        return tuple(map(float, values))

    def objects(self, *names: str) -> HfConfig:
        """Returns one configuration of the fields in these objects and, for `ROPE_FIELDS`, outside of them."""
        groups = [{name: self._take(name) for name in ROPE_FIELDS if name in self.fields}]
        for name in names:
            value = self._take(name)
            check(
                value is None or isinstance(value, dict),
                f"{self.source} has {name}={shown(value)}; it must be an object",
            )
            groups.append(value or {})
        merged: dict[str, Any] = {}
        for group in groups:
            for name, value in group.items():
                before = merged.setdefault(name, value)
                check(before == value, f"{self.source} has {name}={shown(before)} and, elsewhere, {shown(value)}")
        return HfConfig(merged, self.source)

    def finish(self) -> None:
        """Raises `ConfigError` for the fields that nothing asked for."""
        unread = sorted(self._unread)
        check(
            not unread,
            f"{self.source} has fields that moejax does not know for this architecture and that may change the model: "
            + one_line(", ".join(f"{name}={shown(self.fields[name])}" for name in unread[:6])),
        )

    def _take(self, *names: str) -> Any:
        found = [name for name in names if name in self.fields]
        self._unread -= set(found)
        values = [self.fields[name] for name in found]
        differ = " and ".join(f"{name}={shown(self.fields[name])}" for name in found)
        check(all(value == values[0] for value in values[1:]), f"{self.source} has {differ}, which are the same field")
        return values[0] if values else None
