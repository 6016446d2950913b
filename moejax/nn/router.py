"""The router: which experts a token visits, and with what weight.

Dimensions: T this device's tokens, K experts a token, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Routing(NamedTuple):
    """Top-k assignments of T tokens: `gate_TK` float32, summing to 1 over K; `expert_TK` int32, best first."""

    gate_TK: jax.Array
    expert_TK: jax.Array


class RouterStats(NamedTuple):
    """Sums over this device's tokens, float32; added up over devices and microbatches they make the global figures."""

    count_E: jax.Array  # assignments to each expert, dropped ones too
    prob_E: jax.Array  # router probabilities
    z: jax.Array  # squared log-sum-exp of the router's logits
    dropped: jax.Array  # assignments beyond capacity


def route(x_TD: jax.Array, w_router_DE: jax.Array, experts_per_token: int) -> tuple[Routing, RouterStats]:
    """Softmax over all experts, top-k, gates renormalised over the chosen (Mixtral, arXiv 2401.04088); in float32.

    Ties go to the lower expert id. `RouterStats.dropped` is 0 here: the dispatcher fills it in.
    """
    with jax.named_scope("route"):
        logits_TE = x_TD.astype(jnp.float32) @ w_router_DE.astype(jnp.float32)
        log_z_T = jax.nn.logsumexp(logits_TE, axis=-1)
        probs_TE = jnp.exp(logits_TE - log_z_T[:, None])
        prob_TK, expert_TK = lax.top_k(probs_TE, experts_per_token)
        gate_TK = prob_TK / prob_TK.sum(-1, keepdims=True)
        chosen_TKE = expert_TK[..., None] == jnp.arange(probs_TE.shape[-1])[None, None]
        count_E = chosen_TKE.sum((0, 1), dtype=jnp.float32)
        stats = RouterStats(count_E, probs_TE.sum(0), jnp.square(log_z_T).sum(), jnp.zeros_like(log_z_T[0]))
        return Routing(gate_TK, expert_TK), stats
