"""Top-k routing on GPUs: one Pallas kernel, lowered through Triton, and a short second pass over the positions.

A program takes a run of tokens, tile by tile, and carries the counts of the tiles before. Programs run in any order, so
a position inside the kernel is a rank within the program's run; the exclusive sum of the programs' counts, a few
kilobytes, makes it a rank among all. That costs another read and write of `position_TK`: for 64 experts and top-2 a
tenth of the bytes.

jax 0.11 announces that Pallas' way through Triton will go; what is particular to it here is masked loads and stores.

Dims: b sequences, S tokens of one, E experts, K experts a token, D model, n programs a sequence, c tokens of a tile,
e, k and d: E, K and a slice of D rounded up to a power of two, as all shapes in Triton are; T = b S.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from moejax.kernels import manual
from moejax.kernels.top_k_routing import tile
from moejax.kernels.top_k_routing.contract import Routing, RoutingSums, Rules

_TILE = 2048  # logits, 16 a thread of 4 warps: with 32 a thread, top-8 of 256 spills registers
_RUN = 128  # tokens of a program, at least: the sums that it writes are then 2% of its logits
_TILE_TOKENS = 64  # of a tile whose logits are computed here; few, for the weights are read once a tile
_SLICE = 64  # of d_model, at a time
_SMALLEST = 16  # rows and columns of the smallest matrix product that Triton has


class _Sizes(NamedTuple):
    """Of the module's dims, what a kernel is compiled for."""

    S: int
    E: int
    D: int  # 0: the logits are given
    c: int
    e: int
    tiles: int  # of a program


def route(rules: Rules, *inputs_and_bias: jax.Array | None, interpret: bool = False) -> tuple[Routing, RoutingSums]:
    """Routes logits [T, E], or activations [T, D] by weights [D, E]; then the bias [E] or None.

    See `moejax.kernels.top_k_routing.top_k_routing`, and there for `interpret`.
    """
    *inputs, bias_E = inputs_and_bias
    arrays = (*inputs, *(() if bias_E is None else (bias_E,)))
    return manual.unchecked(functools.partial(_route, rules, bias_E is not None, interpret))(*arrays)


def _route(rules: Rules, biased: bool, interpret: bool, *arrays: jax.Array) -> tuple[Routing, RoutingSums]:
    tokens, *weights = arrays[: len(arrays) - biased]
    if weights and (interpret or tokens.dtype != weights[0].dtype):  # CPUs have no 16-bit product summed in 32 bits
        tokens, weights = tokens.astype(jnp.float32), [weights[0].astype(jnp.float32)]
    T, E = tokens.shape[0], (weights or [tokens])[0].shape[1]
    if tokens.size >= 2**31:
        raise ValueError(f"an array {tokens.shape} has {tokens.size} elements; must be fewer than 2**31, to be indexed")
    K, b = rules.experts_per_token, rules.num_sequences
    sizes = _sizes(T // b, E, tokens.shape[1] if weights else 0)
    n = pl.cdiv(sizes.S, sizes.tiles * sizes.c)
    shapes: list[tuple[tuple[int, ...], Any]] = [((T, K), jnp.float32), ((T, K), jnp.int32), ((T, K), jnp.int32)]
    shapes += [((b, n, E), jnp.int32), ((b, n, E), jnp.float32), *[((b, n), jnp.float32)] * 3]
    gate_TK, expert_TK, rank_TK, count_bnE, prob_bnE, *scalars_bn = pl.pallas_call(
        functools.partial(_kernel, rules, sizes, biased),
        grid=(b, n),
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes],
        compiler_params=triton.CompilerParams(num_warps=8 if sizes.c * sizes.e > 2 * _TILE else 4),
        interpret=interpret,
        name="top_k_routing",
    )(tokens, *weights, *arrays[len(arrays) - biased :])

    count_NE = count_bnE.reshape(b * n, E)
    before_NE = jnp.cumsum(count_NE, 0) - count_NE
    token_T = lax.iota(jnp.int32, T)
    program_T = token_T // sizes.S * n + token_T % sizes.S // (sizes.tiles * sizes.c)
    before_TK = before_NE.at[program_T[:, None], expert_TK].get(mode="fill", fill_value=0)
    count_bE, prob_bE = count_bnE.sum(1).astype(jnp.float32), prob_bnE.sum(1)
    sums = RoutingSums(count_bE, prob_bE, *[x_bn.sum() for x_bn in scalars_bn])
    return Routing(gate_TK, expert_TK, rank_TK + before_TK), sums


def _sizes(S: int, E: int, D: int) -> _Sizes:
    e = max(pl.next_power_of_2(E), _SMALLEST if D else 1)
    c = min(pl.next_power_of_2(S), max(_TILE // e, _TILE_TOKENS if D else 1))
    c = max(c, _SMALLEST if D else 1)
    return _Sizes(S, E, D, c, e, max(1, min(_RUN // c, pl.cdiv(S, c))))


def _kernel(rules: Rules, sizes: _Sizes, biased: bool, tokens_ref: Any, *refs: Any) -> None:
    rest, (gate_ref, expert_ref, rank_ref, count_ref, prob_ref, *scalar_refs) = refs[:-8], refs[-8:]
    S, E, D, c, e, tiles = sizes
    sequence, program = pl.program_id(0), pl.program_id(1)
    expert_e = lax.iota(jnp.int32, e)
    bias = None
    if biased:
        bias = triton.load(rest[-1].at[expert_e], mask=expert_e < E, other=0.0)[None]

    def one_tile(i: jax.Array, carry: Any) -> Any:
        place_c1 = ((program * tiles + i) * c + lax.iota(jnp.int32, c))[:, None]  # within the sequence
        token_c1, real_c1 = sequence * S + place_c1, place_c1 < S
        if D:
            logits_ce = _product(sizes, tokens_ref, rest[0], token_c1, real_c1)
        else:
            logits_ce = _load(tokens_ref, token_c1, expert_e[None], real_c1 & (expert_e < E)[None])
        routed = tile.route(logits_ce, bias, rules, axis=1, num_experts=E, real=real_c1)
        chosen_ce = jnp.where(routed.chosen, 1, 0)
        rank_ce = jnp.cumsum(chosen_ce, 0) - chosen_ce + carry[0]  # the counts of the program's earlier tiles
        ranks = tile.pick(rank_ce, routed.experts, 1)
        for ref, columns in ((gate_ref, routed.gates), (expert_ref, routed.experts), (rank_ref, ranks)):
            _store_columns(ref, columns, token_c1, real_c1)
        sums = (chosen_ce, routed.prob, routed.z, routed.entropy, routed.invalid)
        return tuple(old + new.sum(0, keepdims=True) for old, new in zip(carry, sums, strict=True))

    zero_1e, zero_11 = jnp.zeros((1, e), jnp.float32), jnp.zeros((1, 1), jnp.float32)
    start = (jnp.zeros((1, e), jnp.int32), zero_1e, zero_11, zero_11, zero_11)
    count_1e, prob_1e, *scalars = lax.fori_loop(0, tiles, one_tile, start)
    for ref, sum_1e in ((count_ref, count_1e), (prob_ref, prob_1e)):
        triton.store(ref.at[sequence, program, expert_e], sum_1e[0], mask=expert_e < E)
    for ref, sum_11 in zip(scalar_refs, scalars, strict=True):
        triton.store(ref.at[sequence, program + lax.iota(jnp.int32, 1)], sum_11[0])


def _product(sizes: _Sizes, x_ref: Any, w_ref: Any, token_c1: jax.Array, real_c1: jax.Array) -> jax.Array:
    """The logits of a tile of tokens, a slice of d_model at a time."""
    d = min(_SLICE, max(_SMALLEST, pl.next_power_of_2(sizes.D)))
    expert_e = lax.iota(jnp.int32, sizes.e)
    precision = lax.Precision.HIGHEST if x_ref.dtype == jnp.float32 else None

    def add_slice(i: jax.Array, logits_ce: jax.Array) -> jax.Array:
        model_d = i * d + lax.iota(jnp.int32, d)
        inside_d = model_d < sizes.D
        x_cd = _load(x_ref, token_c1, model_d[None], real_c1 & inside_d[None])
        w_de = _load(w_ref, model_d[:, None], expert_e[None], inside_d[:, None] & (expert_e < sizes.E)[None])
        return logits_ce + jnp.dot(x_cd, w_de, precision=precision, preferred_element_type=jnp.float32)

    return lax.fori_loop(0, pl.cdiv(sizes.D, d), add_slice, jnp.zeros((sizes.c, sizes.e), jnp.float32))


def _load(ref: Any, row: jax.Array, column: jax.Array, mask: jax.Array) -> jax.Array:
    row, column = jnp.broadcast_to(row, mask.shape), jnp.broadcast_to(column, mask.shape)
    return triton.load(ref.at[row, column], mask=mask, other=jnp.zeros((), ref.dtype))


def _store_columns(ref: Any, columns: list[jax.Array], row_c1: jax.Array, mask_c1: jax.Array) -> None:
    """Stores columns [c, 1] side by side, at once, so that neighbors in memory are written together."""
    k = pl.next_power_of_2(len(columns))
    column_ck = lax.broadcasted_iota(jnp.int32, (row_c1.shape[0], k), 1)
    values_ck = jnp.zeros(column_ck.shape, ref.dtype)
    for j, column in enumerate(columns):
        values_ck = jnp.where(column_ck == j, column, values_ck)
    row_ck = jnp.broadcast_to(row_c1, column_ck.shape)
    triton.store(ref.at[row_ck, column_ck], values_ck, mask=mask_c1 & (column_ck < len(columns)))
