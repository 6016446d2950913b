"""The router: which experts a token visits, and with what weight.

Dimensions: T this device's tokens, K experts a token, E experts, b sequences that the tokens are of.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import ModelConfig


class Routing(NamedTuple):
    """Top-k assignments of T tokens, best first.

    `expert_TK` int32 is E for a token that goes nowhere, because its logits are not finite. `position_TK` int32 counts
    the assignments to the same expert that come before, token by token and choice by choice.
    """

    gate_TK: jax.Array
    expert_TK: jax.Array
    position_TK: jax.Array


class RoutingSums(NamedTuple):
    """Sums over this device's tokens, float32: by sequence, so that balance can be asked of each, and in all."""

    count_bE: jax.Array  # assignments to each expert
    prob_bE: jax.Array  # router probabilities
    z: jax.Array  # squared log-sum-exp of the router's logits
    entropy: jax.Array  # of the router's probabilities, in nats; no gradient
    invalid: jax.Array  # tokens whose logits are not finite


def route(x_TD: jax.Array, p: dict[str, Any], m: ModelConfig, num_sequences: int) -> tuple[Routing, RoutingSums]:
    """Scores every expert in float32 and takes the best of each token; ties go to the lower expert id.

    Args:
        x_TD: tokens of `num_sequences` equal sequences, one after the other.
        p: `w_router_DE` and, with `m.router_bias`, `router_bias_E`.
        m: the rule.
        num_sequences: b.
    """
    with jax.named_scope("route"):
        logits_TE = x_TD.astype(jnp.float32) @ p["w_router_DE"].astype(jnp.float32)
        log_z_T = jax.nn.logsumexp(logits_TE, axis=-1)
        if m.router_score == "softmax":
            score_TE = probs_TE = jnp.exp(logits_TE - log_z_T[:, None])
        else:
            score_TE = jax.nn.sigmoid(logits_TE)
            probs_TE = score_TE / score_TE.sum(-1, keepdims=True)
        select_TE = score_TE + p["router_bias_E"][None] if m.router_bias else score_TE
        _, expert_TK = lax.top_k(lax.stop_gradient(select_TE), m.experts_per_token)
        gate_TK = jnp.take_along_axis(score_TE, expert_TK, axis=-1)
        if m.router_renormalize:
            gate_TK = gate_TK / gate_TK.sum(-1, keepdims=True)
        chosen_TKE = expert_TK[..., None] == jnp.arange(m.num_experts)[None, None]
        count_TKE = chosen_TKE.astype(jnp.int32)
        before_TKE = jnp.cumsum(count_TKE.reshape(-1, m.num_experts), axis=0).reshape(chosen_TKE.shape) - count_TKE
        position_TK = (before_TKE * count_TKE).sum(-1)
        count_bE = chosen_TKE.reshape(num_sequences, -1, m.num_experts).sum(1, dtype=jnp.float32)
        prob_bE = probs_TE.reshape(num_sequences, -1, m.num_experts).sum(1)
        entropy = -lax.stop_gradient(probs_TE * jnp.log(jnp.maximum(probs_TE, 1e-30))).sum()
        invalid = jnp.zeros_like(entropy)
        sums = RoutingSums(count_bE, prob_bE, jnp.square(log_z_T).sum(), entropy, invalid)
        return Routing(gate_TK, expert_TK, position_TK), sums
