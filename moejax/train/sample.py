"""Text from a model in training: a look at what it has learned, not a serving engine.

Every token runs the whole window through the training program again; there is no cache.

Dimensions: B samples, S window.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.checks import check
from moejax.data import Tokenizer
from moejax.layout import VOCAB_AXES
from moejax.nn.embedding import check_ids
from moejax.program import Program

PROMPT_TOKENS = 32
_TEMPERATURE = 0.8


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt, and the text with which the model goes on."""

    prompt: str
    continuation: str


def sample_text(program: Program, params: Any, tokenizer: Tokenizer, text: str, num_tokens: int) -> Sample:
    """Continues the beginning of a text.

    Args:
        program: see `generate`.
        params: the parameters, as stored.
        tokenizer: of the model.
        text: its first `PROMPT_TOKENS` tokens are the prompt, or half of the tokens that fit, if that is less.
        num_tokens: tokens to add; fewer if they do not fit.

    Raises:
        ConfigError: no prompt of one token fits with one token to add.
    """
    room = longest(program)
    check(room > 1, f"max_seq_len={program.model.max_seq_len} has no room for a sample on this mesh")
    ids = [tokenizer.separator, *tokenizer.encode(text[: 8 * PROMPT_TOKENS])]
    prompt = np.asarray(ids[: min(PROMPT_TOKENS, room // 2)], np.int32)
    num_tokens = min(num_tokens, room - len(prompt))
    tokens_BS = generate(program, params, prompt, num_tokens, vocab_size=tokenizer.vocab_size)
    # Decoded as a whole, for a decoder may drop a space at the beginning, and a letter may be torn in two.
    prompt_text = tokenizer.decode(prompt).rstrip("\ufffd")
    return Sample(prompt_text, tokenizer.decode(tokens_BS[0]).removeprefix(prompt_text))


def longest(program: Program) -> int:
    """Returns how many tokens a prompt and its continuation may have together."""
    tensor = program.layout.mesh.tensor
    return program.model.max_seq_len // tensor * tensor


def generate(program: Program, params: Any, prompt: np.ndarray, num_tokens: int, *, vocab_size: int) -> np.ndarray:
    """Continues a prompt, with the same draws every time; as many samples as the mesh's smallest batch holds.

    Args:
        program: the training program; sampled from without drops.
        params: the parameters, as stored.
        prompt: int32 [prompt length], at least one token.
        num_tokens: tokens to add.
        vocab_size: the tokenizer's; ids from there on are never drawn.

    Returns:
        int32 [B, prompt length + num_tokens].
    """
    check(len(prompt) > 0, "prompt=[] must have at least one token")
    check_ids("prompt", prompt, program.model.vocab_size)
    length = len(prompt) + num_tokens
    check(
        length <= longest(program),
        f"prompt and num_tokens={num_tokens} make {length} tokens; at most {longest(program)} fit, for "
        f"max_seq_len={program.model.max_seq_len}",
    )
    tensor = program.layout.mesh.tensor
    program = program.without_drops().with_layout(grad_accumulation_steps=1)
    program = program.for_batch(program.layout.batch_unit(program.model), math.ceil(length / tensor) * tensor)
    logits_spec = P(program.layout.mesh.batch_axes, VOCAB_AXES)
    next_logits = program.sharded(
        program.next_token_logits, (program.param_specs, program.batch_spec, P()), logits_spec
    )

    def extend(params: Any, tokens_BS: jax.Array, key: jax.Array) -> jax.Array:
        def one(position: jax.Array, tokens_BS: jax.Array) -> jax.Array:
            logits_BV = next_logits(params, tokens_BS, position)[:, :vocab_size]
            next_B = jax.random.categorical(jax.random.fold_in(key, position), logits_BV / _TEMPERATURE)
            return lax.dynamic_update_slice_in_dim(tokens_BS, next_B.astype(jnp.int32)[:, None], position + 1, axis=1)

        return lax.fori_loop(len(prompt) - 1, length - 1, one, tokens_BS)

    tokens_BS = np.zeros((program.layout.batch_size, program.layout.seq_len), np.int32)
    tokens_BS[:, : len(prompt)] = prompt
    everywhere = NamedSharding(program.mesh, P())
    run = jax.jit(extend, out_shardings=everywhere, compiler_options=program.xla_options)
    return np.asarray(run(params, tokens_BS, jax.random.key(0)))[:, :length]
