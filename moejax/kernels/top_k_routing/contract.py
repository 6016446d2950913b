"""What routing is asked and what it answers.

Dims: T tokens, K experts a token, E experts, b sequences.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax

Score = Literal["softmax", "sigmoid"]


class Rules(NamedTuple):
    """How to route; hashable, so that it can be a static argument."""

    experts_per_token: int
    score: Score
    renormalize: bool
    num_sequences: int
    num_groups: int = 1
    groups_per_token: int = 1


class Routing(NamedTuple):
    """The assignments of T tokens.

    gate_TK: float32 [T, K], best first; 0 where the token is not routed.
    expert_TK: int32 [T, K]; E stands for "not routed": a token with a logit that is not finite goes nowhere.
    position_TK: int32 [T, K]; how many assignments before this one, in row-major (token, choice) order, have the same
      expert: its rank within that expert, from 0. 0 where the token is not routed.
    """

    gate_TK: jax.Array
    expert_TK: jax.Array
    position_TK: jax.Array


class RoutingSums(NamedTuple):
    """Sums over tokens, float32; those with `_b` over each of `num_sequences` equal runs of consecutive tokens.

    count_bE: [b, E] assignments to each expert. No gradient.
    prob_bE: [b, E] router probabilities: the softmax, or for sigmoid scores s / sum(s) (DeepSeek-V3, arXiv 2412.19437,
      eq. 17 to 20).
    z: scalar, squared logsumexp of the logits.
    entropy: scalar, entropy of the probabilities, in nats. No gradient.
    invalid: scalar, tokens with a logit that is not finite, which add to no other sum. No gradient.
    """

    count_bE: jax.Array
    prob_bE: jax.Array
    z: jax.Array
    entropy: jax.Array
    invalid: jax.Array
