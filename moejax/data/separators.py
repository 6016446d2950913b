"""Finds the token that leads each document, from the files of a model's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from moejax.checks import ConfigError, check

ENDOFTEXT = "<|endoftext|>"  # both the first and the last token of a text in GPT-2's family

# Tried in this order where nothing else decides: a name that begins a text goes before one that ends it.
_KNOWN = (
    ENDOFTEXT,
    *("<s>", "<|begin_of_text|>", "<｜begin▁of▁sentence｜>", "]~!b[", "<bos>", "<|startoftext|>", "[BOS]"),
    *("</s>", "<|end_of_text|>", "<｜end▁of▁sentence｜>", "[e~[", "<eos>", "[EOS]"),
)


def find_separator(tokenizer: tokenizers.Tokenizer, name: str, wanted: str = "", folder: Path | None = None) -> str:
    """Returns the token that leads each document: `wanted` if given, else BOS where the model has one, else EOS.

    `tokenizer_config.json` and `special_tokens_map.json` in `folder` name the two. EOS goes first if the former says
    `"add_bos_token": false`, because the model has then never seen BOS before a document. Without these files, the
    token that the tokenizer itself puts before a text decides, then the one after it, then well-known names.

    Raises:
      ConfigError: the tokenizer has no such token, or a file in `folder` is not JSON.
    """
    if wanted:
        check(
            tokenizer.token_to_id(wanted) is not None,
            f"separator={wanted!r} is not a token of tokenizer={name!r}; {_describe_special_tokens(tokenizer)}",
        )
        return wanted
    declared = _declared(folder) if folder is not None else ()
    for token in (*declared, *_added_around_text(tokenizer), *_KNOWN):
        if tokenizer.token_to_id(token) is not None:
            return token
    raise ConfigError(
        f"tokenizer={name!r} does not say which token separates documents; set data.separator to it: "
        f"{_describe_special_tokens(tokenizer)}"
    )


def _describe_special_tokens(tokenizer: tokenizers.Tokenizer) -> str:
    """Returns "its special tokens are ...", with at most 20 of them."""
    tokens = [added.content for _, added in sorted(tokenizer.get_added_tokens_decoder().items()) if added.special]
    if not tokens:
        return "it has no special tokens"
    more = f" and {len(tokens) - 20} more" if len(tokens) > 20 else ""
    return f"its special tokens are {', '.join(tokens[:20])}{more}"


def _declared(folder: Path) -> Iterator[str]:
    """Yields the tokens that the files in `folder` call BOS and EOS, the one that leads documents first."""
    config, special = (_read_json(folder / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    roles = ("bos_token", "eos_token")
    for role in reversed(roles) if config.get("add_bos_token") is False else roles:
        for token in (config.get(role), special.get(role)):
            content = token.get("content") if isinstance(token, dict) else token
            if isinstance(content, str):
                yield content


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}, which describes the tokenizer beside it, cannot be read ({error})") from None
    return content if isinstance(content, dict) else {}


def _added_around_text(tokenizer: tokenizers.Tokenizer) -> Iterator[str]:
    """Yields the special token that `tokenizer` puts first into an encoded text, and the one it puts last."""
    encoding = tokenizer.encode("a", add_special_tokens=True)
    for place in (0, -1):
        if encoding.ids and encoding.special_tokens_mask[place]:
            yield encoding.tokens[place]
