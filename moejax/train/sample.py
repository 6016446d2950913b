"""Text from a model in training: a look at what it has learned, not a serving engine.

Every token runs the whole window through the training program again; there is no cache.

Dimensions: B samples, S window.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.config import check
from moejax.mesh import PIPELINE, TENSOR
from moejax.model import Program
from moejax.sharding import VOCAB_AXES


def generate(
    program: Program,
    params: Any,
    prompt: np.ndarray,
    num_tokens: int,
    *,
    vocab_size: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> np.ndarray:
    """Continues a prompt; as many samples as the mesh's smallest batch holds.

    Args:
        program: the training program; sampled from without drops.
        params: the parameters, as stored.
        prompt: int32 [prompt length], at least one token.
        num_tokens: tokens to add.
        vocab_size: the tokenizer's; ids from there on are never drawn.
        temperature: 0 takes the likeliest token.
        seed: of the draws.

    Returns:
        int32 [B, prompt length + num_tokens].
    """
    check(len(prompt) > 0, "prompt=[] must have at least one token")
    length = len(prompt) + num_tokens
    tensor = program.mesh.shape[TENSOR]
    window = math.ceil(length / tensor) * tensor
    check(
        window <= program.model.max_seq_len,
        f"prompt and num_tokens={num_tokens} make {window} tokens; at most max_seq_len={program.model.max_seq_len} fit",
    )
    program = program.without_drops()
    next_logits = program.sharded(
        program.next_token_logits, (program.param_specs, program.batch_spec, P()), P(program.batch_axes, VOCAB_AXES)
    )

    def extend(params: Any, tokens_BS: jax.Array, key: jax.Array) -> jax.Array:
        def one(position: jax.Array, tokens_BS: jax.Array) -> jax.Array:
            logits_BV = next_logits(params, tokens_BS, position)[:, :vocab_size]
            if temperature == 0:
                next_B = jnp.argmax(logits_BV, axis=-1)
            else:
                next_B = jax.random.categorical(jax.random.fold_in(key, position), logits_BV / temperature)
            return lax.dynamic_update_slice_in_dim(tokens_BS, next_B.astype(jnp.int32)[:, None], position + 1, axis=1)

        return lax.fori_loop(len(prompt) - 1, length - 1, one, tokens_BS)

    parallel = program.parallel
    batch = math.prod(program.mesh.shape[a] for a in program.batch_axes)
    batch *= parallel.num_microbatches * max(1, parallel.batch_split)
    if program.model.num_dense_layers:
        batch *= program.mesh.shape[PIPELINE]
    tokens_BS = np.zeros((batch, window), np.int32)
    tokens_BS[:, : len(prompt)] = prompt
    everywhere = NamedSharding(program.mesh, P())
    run = jax.jit(extend, out_shardings=everywhere, compiler_options=program.xla_options)
    return np.asarray(run(params, tokens_BS, jax.random.key(seed)))[:, :length]
