"""Top-k routing in plain jax: the CPU backend, and the gradient of every backend.

Dims: T tokens, K experts a token, E experts, D model, b sequences; n blocks of c tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from moejax.kernels.top_k_routing import tile
from moejax.kernels.top_k_routing.contract import Routing, RoutingSums, Rules

POSITIONS_BLOCK = 64  # tokens that `positions` counts by one product


def route(rules: Rules, logits_TE: jax.Array, bias_E: jax.Array | None) -> tuple[Routing, RoutingSums]:
    """See `moejax.kernels.top_k_routing.top_k_routing`; logits and bias are float32."""
    E = logits_TE.shape[1]
    bias = None if bias_E is None else bias_E[None]
    routed = tile.route(logits_TE, bias, rules, axis=1, num_experts=E)
    expert_TK = jnp.concatenate(routed.experts, 1)
    chosen_bSE = routed.chosen.reshape(rules.num_sequences, -1, E)
    sums = RoutingSums(
        count_bE=chosen_bSE.sum(1, dtype=jnp.float32),
        prob_bE=routed.prob.reshape(chosen_bSE.shape).sum(1),
        z=routed.z.sum(),
        entropy=routed.entropy.sum(),
        invalid=routed.invalid.sum(),
    )
    return Routing(jnp.concatenate(routed.gates, 1), expert_TK, positions(routed.chosen, expert_TK)), sums


def gradient(
    rules: Rules, logits_TE: jax.Array, routing: Routing, dgate_TK: jax.Array, dprob_bE: jax.Array, dz: jax.Array
) -> jax.Array:
    """The gradient of the logits [T, E], given the routing and the gradients of its gates and sums.

    Row by row, from the scores computed anew: sums along a row, then one elementwise result, without a scatter. With u
    the logarithms of the scores, p = softmax(u) the probabilities, and h_j = g_j dg_j at the chosen experts,

        du = p (dp - p . dp) + h - g sum(h)    for gates that are divided by their sum, g = softmax(u at the chosen)
        du = p (dp - p . dp) + h - p sum(h)    for g = p, and without the last term for g = sigmoid(logits) = exp(u).
    """
    E = logits_TE.shape[1]
    gate_TK, expert_TK, _ = routing
    valid_T1 = expert_TK[:, :1] < E
    logits_TE = jnp.where(valid_T1, logits_TE, 0.0)
    log_score_TE, log_total_T1, log_z_T1 = tile.log_scores(logits_TE, rules.score, 1)
    prob_TE = jnp.exp(log_score_TE - log_total_T1)
    dprob_TE = jnp.repeat(dprob_bE, logits_TE.shape[0] // rules.num_sequences, 0)
    minus_T1 = -(prob_TE * dprob_TE).sum(1, keepdims=True)
    at_chosen_TK = gate_TK * dgate_TK
    if rules.renormalize:
        at_chosen_TK -= gate_TK * at_chosen_TK.sum(1, keepdims=True)
    elif rules.score == "softmax":
        minus_T1 -= at_chosen_TK.sum(1, keepdims=True)
    dlogits_TE = prob_TE * (dprob_TE + minus_T1)
    expert_1E = jnp.arange(E, dtype=jnp.int32)[None]
    for expert_T1, at_chosen_T1 in zip(_columns(expert_TK), _columns(at_chosen_TK), strict=True):
        dlogits_TE += jnp.where(expert_T1 == expert_1E, at_chosen_T1, 0.0)
    if rules.score == "sigmoid":
        dlogits_TE *= jnp.exp(log_score_TE - logits_TE)  # sigmoid(-logits)
    dlogits_TE += 2 * dz * log_z_T1 * jnp.exp(logits_TE - log_z_T1)
    return jnp.where(valid_T1, dlogits_TE, 0.0)


def router_logits(x_TD: jax.Array, w_DE: jax.Array) -> jax.Array:
    """x w [T, E], with factors, products and sums in float32."""
    return jnp.dot(x_TD.astype(jnp.float32), w_DE.astype(jnp.float32), precision=lax.Precision.HIGHEST)


def _columns(x_TK: jax.Array) -> list[jax.Array]:
    return [x_TK[:, j : j + 1] for j in range(x_TK.shape[1])]


def positions(chosen_TE: jax.Array, expert_TK: jax.Array) -> jax.Array:
    """How many earlier tokens chose the same expert: those of the token's block, and those of the blocks before it."""
    T, E = chosen_TE.shape
    c = min(POSITIONS_BLOCK, T)
    chosen_ncE = jnp.pad(chosen_TE.astype(jnp.float32), ((0, -T % c), (0, 0))).reshape(-1, c, E)
    before_cc = jnp.tril(jnp.ones((c, c), jnp.float32), -1)
    rank_ncE = jnp.einsum("ij,nje->nie", before_cc, chosen_ncE)  # sums of at most c ones, exact
    count_nE = chosen_ncE.sum(1).astype(jnp.int32)
    base_nE = jnp.cumsum(count_nE, 0) - count_nE
    position_TE = (rank_ncE.astype(jnp.int32) + base_nE[:, None]).reshape(-1, E)
    # Read by a gather, for the CPU's sake: eight masked sums over 64 experts take three times as long.
    return jnp.take_along_axis(position_TE[:T], expert_TK, 1, mode="fill", fill_value=0)
