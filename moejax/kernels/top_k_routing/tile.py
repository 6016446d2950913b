"""The mathematics of routing, written once: for all tokens in `reference`, for a tile of them inside the kernels.

An array of a tile has experts along one of its two dimensions, `axis`, and tokens along the other; what there is once
a token has size 1 along `axis`. So each backend lays out a tile as suits it. Only operations that Pallas lowers for
both GPU and TPU are used.

The scores enter as logarithms. The probability of an expert is the softmax of them, and so are the renormalized gates,
over the chosen: for either kind of score no gate divides by a sum that underflowed.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.top_k_routing.contract import Rules, Score


class Tile(NamedTuple):
    """A routed tile; zeros, and expert E, for tokens that are not routed."""

    gates: list[jax.Array]  # K times float32, once a token
    experts: list[jax.Array]  # K times int32, once a token
    chosen: jax.Array  # bool: the token goes to the expert
    prob: jax.Array  # float32 probabilities
    z: jax.Array  # the rest float32, once a token: squared logsumexp of the logits
    entropy: jax.Array
    invalid: jax.Array  # 1 if a logit is not finite


def route(
    logits: jax.Array,
    bias: jax.Array | None,
    rules: Rules,
    *,
    axis: int,
    num_experts: int,
    real: jax.Array | None = None,
) -> Tile:
    """Routes a tile of float32 logits.

    Args:
      logits: [tokens, experts], or the other way round for axis=0. Experts from `num_experts` on are padding.
      bias: float32, once an expert, or None.
      rules: the rules.
      axis: the dimension that experts lie along.
      num_experts: how many experts there are.
      real: bool, once a token: whether there is such a token; None for all. What is not real comes out as zeros.
    """
    expert = lax.broadcasted_iota(jnp.int32, logits.shape, axis)
    exists = expert < num_experts
    broken = exists & ~(jnp.abs(logits) < jnp.inf)
    invalid = jnp.where(broken, 1.0, 0.0).max(axis, keepdims=True)
    valid = invalid == 0
    if real is not None:
        valid, invalid = valid & real, jnp.where(real, invalid, 0.0)
    logits = jnp.where(exists, jnp.where(valid, logits, 0.0), -jnp.inf)

    log_score, log_total, log_z = log_scores(logits, rules.score, axis)
    log_prob = log_score - log_total
    prob = jnp.exp(log_prob)
    # The scores rise with the logits, so that without a bias these select the same, and no rounding of the scores makes
    # ties: every backend, whatever its `exp`, then picks the same experts.
    value = logits
    if bias is not None:
        value = jnp.where(exists, (prob if rules.score == "softmax" else jnp.exp(log_score)) + bias, -jnp.inf)
    if rules.groups_per_token < rules.num_groups:
        scores = 1 if bias is None else 2
        value = jnp.where(_in_best_groups(value, expert, scores, rules, axis, num_experts), value, -jnp.inf)
    experts, picked, chosen = [], [], jnp.zeros(logits.shape, bool)
    for best, lowest, here in _descending(value, expert, rules.experts_per_token, axis, num_experts):
        experts.append(jnp.where(valid, lowest, num_experts))
        picked.append(best if bias is None else jnp.where(here, logits, 0.0).sum(axis, keepdims=True))
        chosen |= here & valid
    return Tile(
        gates=[jnp.where(valid, gate, 0.0) for gate in gates(picked, log_total, rules)],
        experts=experts,
        chosen=chosen,
        prob=jnp.where(valid, prob, 0.0),
        z=jnp.where(valid, log_z * log_z, 0.0),
        entropy=jnp.where(valid, -jnp.where(prob > 0, prob * log_prob, 0.0).sum(axis, keepdims=True), 0.0),
        invalid=invalid,
    )


def _descending(
    value: jax.Array, expert: jax.Array, number: int, axis: int, num_experts: int
) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
    """Yields a token's `number` highest values, each with its expert and where that is; of equals the lowest first."""
    for _ in range(number):
        best = value.max(axis, keepdims=True)
        lowest = jnp.where(value == best, expert, num_experts).min(axis, keepdims=True)
        here = expert == lowest
        yield best, lowest, here
        value = jnp.where(here, -jnp.inf, value)


def _in_best_groups(
    value: jax.Array, expert: jax.Array, scores: int, rules: Rules, axis: int, num_experts: int
) -> jax.Array:
    """Whether an expert is in one of its token's best groups, by the sum of the `scores` highest values in a group."""
    size = num_experts // rules.num_groups
    members = [(expert >= g * size) & (expert < (g + 1) * size) for g in range(rules.num_groups)]
    totals = []
    for inside in members:
        best = _descending(jnp.where(inside, value, -jnp.inf), expert, scores, axis, num_experts)
        totals.append(functools.reduce(operator.add, (x for x, _, _ in best)))
    allowed = jnp.zeros(value.shape, bool)
    for g, (inside, total) in enumerate(zip(members, totals, strict=True)):
        rivals = [rival >= total if h < g else rival > total for h, rival in enumerate(totals) if h != g]
        rank = functools.reduce(operator.add, (jnp.where(ahead, 1, 0) for ahead in rivals))
        allowed |= inside & (rank < rules.groups_per_token)
    return allowed


def log_scores(logits: jax.Array, score: Score, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(log of the scores up to a constant, its logsumexp, the logsumexp of the logits), the latter two once a token."""
    log_z = _logsumexp(logits, axis)
    if score == "softmax":
        return logits, log_z, log_z
    log_score = _log_sigmoid(logits)
    return log_score, _logsumexp(log_score, axis), log_z


def gates(picked: list[jax.Array], log_total: jax.Array, rules: Rules) -> list[jax.Array]:
    """The gates of the chosen experts, from their logits."""
    logs = picked if rules.score == "softmax" else [_log_sigmoid(logit) for logit in picked]
    if rules.renormalize:
        peak = functools.reduce(jnp.maximum, logs)
        weights = [jnp.exp(log - peak) for log in logs]
        total = functools.reduce(operator.add, weights)
        return [weight / total for weight in weights]
    return [jnp.exp(log - log_total if rules.score == "softmax" else log) for log in logs]


def pick(x: jax.Array, experts: list[jax.Array], axis: int) -> list[jax.Array]:
    """x at each choice's expert, once a token; 0 where it is not routed."""
    expert = lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return [jnp.where(expert == e, x, jnp.zeros_like(x)).sum(axis, keepdims=True) for e in experts]


def _logsumexp(x: jax.Array, axis: int) -> jax.Array:
    peak = x.max(axis, keepdims=True)
    return peak + jnp.log(jnp.exp(x - peak).sum(axis, keepdims=True))


def _log_sigmoid(x: jax.Array) -> jax.Array:
    return jnp.minimum(x, 0.0) - jnp.log1p(jnp.exp(-jnp.abs(x)))
