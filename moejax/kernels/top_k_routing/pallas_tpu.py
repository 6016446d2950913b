"""Top-k routing on TPUs: one Pallas kernel over tiles of tokens, one after the other.

Tokens lie along the lanes and experts along the sublanes: 16 experts along 128 lanes would leave 112 of them empty,
here and in memory. The transposes around the kernel are the layout that XLA gives the producer and the consumer. The
grid of a TPU core is a loop, so the counts of the tiles before are at hand, and every sum is done in place.

Dims: b sequences, S tokens of one, E experts, K experts a token, D model, c tokens of a tile; T = b S.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from moejax.kernels import manual
from moejax.kernels.top_k_routing import tile
from moejax.kernels.top_k_routing.contract import Routing, RoutingSums, Rules

_TILE = 512  # tokens, at most
_TILE_BYTES = 4 * 1024 * 1024  # of activations; two such tiles are in vector memory
_LANES = 128


def route(rules: Rules, *inputs_and_bias: jax.Array | None, interpret: bool = False) -> tuple[Routing, RoutingSums]:
    """Routes logits [T, E], or activations [T, D] by weights [D, E]; then the bias [E] or None.

    See `moejax.kernels.top_k_routing.top_k_routing`, and there for `interpret`.
    """
    *inputs, bias_E = inputs_and_bias
    arrays = (*inputs, *(() if bias_E is None else (bias_E,)))
    return manual.unchecked(functools.partial(_route, rules, bias_E is not None, interpret))(*arrays)


def _route(rules: Rules, biased: bool, interpret: bool, *arrays: jax.Array) -> tuple[Routing, RoutingSums]:
    inputs = arrays[: len(arrays) - biased]
    T, E = inputs[0].shape[0], inputs[-1].shape[1]
    K, b = rules.experts_per_token, rules.num_sequences
    S = T // b
    if len(inputs) == 1:
        c = min(_TILE, S)
        tokens, tokens_spec, weights = inputs[0].reshape(b, S, E).mT, _lanes(E, c), []
    else:
        x_TD, w_DE = inputs
        if interpret or x_TD.dtype != w_DE.dtype:  # CPUs have no 16-bit product summed in 32 bits
            x_TD, w_DE = x_TD.astype(jnp.float32), w_DE.astype(jnp.float32)
        D = x_TD.shape[1]
        fits = _TILE_BYTES // (D * x_TD.dtype.itemsize) // _LANES * _LANES
        c = min(_TILE, max(_LANES, fits), S)
        tokens, weights = x_TD.reshape(b, S, D), [w_DE.T]
        tokens_spec = pl.BlockSpec((None, c, D), lambda i, j: (i, j, 0))
    per_expert = [*weights, *(bias_E[:, None] for bias_E in arrays[len(inputs) :])]
    dtypes = (jnp.float32, jnp.int32, jnp.int32)
    gate_bKS, expert_bKS, position_bKS, count_bE1, prob_bE1, scalars_b31 = pl.pallas_call(
        functools.partial(_kernel, rules, S, E, biased),
        grid=(b, pl.cdiv(S, c)),
        in_specs=[tokens_spec, *(pl.BlockSpec(x.shape, lambda i, j: (0, 0)) for x in per_expert)],
        out_specs=[_lanes(K, c)] * 3 + [_sums(E), _sums(E), _sums(3)],
        out_shape=[jax.ShapeDtypeStruct((b, K, S), dtype) for dtype in dtypes]
        + [jax.ShapeDtypeStruct((b, rows, 1), jnp.float32) for rows in (E, E, 3)],
        scratch_shapes=[pltpu.VMEM((E, 1), jnp.float32)],
        interpret=interpret,
        name="top_k_routing",
    )(tokens, *per_expert)
    routing = Routing(*(x.mT.reshape(T, K) for x in (gate_bKS, expert_bKS, position_bKS)))
    return routing, RoutingSums(count_bE1[..., 0], prob_bE1[..., 0], *scalars_b31[..., 0].sum(0))


def _lanes(rows: int, c: int) -> pl.BlockSpec:
    """Tiles of an array [b, rows, S]."""
    return pl.BlockSpec((None, rows, c), lambda i, j: (i, 0, j))


def _sums(rows: int) -> pl.BlockSpec:
    """What is added to by all tiles of a sequence, of an array [b, rows, 1]."""
    return pl.BlockSpec((None, rows, 1), lambda i, j: (i, 0, 0))


def _kernel(rules: Rules, S: int, E: int, biased: bool, tokens_ref: Any, *refs: Any) -> None:
    *rest, gate_ref, expert_ref, position_ref, count_ref, prob_ref, scalars_ref, before_ref = refs
    i, j = pl.program_id(0), pl.program_id(1)

    @pl.when((i == 0) & (j == 0))
    def _() -> None:
        before_ref[...] = jnp.zeros_like(before_ref)

    @pl.when(j == 0)
    def _() -> None:
        for ref in (count_ref, prob_ref, scalars_ref):
            ref[...] = jnp.zeros_like(ref)

    if len(rest) == biased:
        logits_Ec = tokens_ref[...]
    else:  # w_ED times x_cD, transposed on its way into the matrix unit
        precision = lax.Precision.HIGHEST if tokens_ref.dtype == jnp.float32 else None
        logits_Ec = lax.dot_general(
            rest[0][...], tokens_ref[...], (((1,), (1,)), ((), ())), precision, preferred_element_type=jnp.float32
        )
    c = logits_Ec.shape[1]
    real_1c = j * c + lax.broadcasted_iota(jnp.int32, (1, c), 1) < S
    routed = tile.route(logits_Ec, rest[-1][...] if biased else None, rules, axis=0, num_experts=E, real=real_1c)

    # Sums of ones in the matrix unit, exact: how many earlier tokens of the tile chose the same expert.
    earlier_cc = lax.broadcasted_iota(jnp.int32, (c, c), 0) < lax.broadcasted_iota(jnp.int32, (c, c), 1)
    chosen_Ec = jnp.where(routed.chosen, 1.0, 0.0)
    rank_Ec = jnp.dot(
        chosen_Ec.astype(jnp.bfloat16), earlier_cc.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    positions = tile.pick(rank_Ec + before_ref[...], routed.experts, 0)
    for k, (gate, expert, position) in enumerate(zip(routed.gates, routed.experts, positions, strict=True)):
        gate_ref[k : k + 1] = gate
        expert_ref[k : k + 1] = expert
        position_ref[k : k + 1] = position.astype(jnp.int32)

    count_E1 = chosen_Ec.sum(1, keepdims=True)
    before_ref[...] += count_E1
    count_ref[...] += count_E1
    prob_ref[...] += routed.prob.sum(1, keepdims=True)
    for k, scalar in enumerate((routed.z, routed.entropy, routed.invalid)):
        scalars_ref[k : k + 1] += scalar.sum(1, keepdims=True)
