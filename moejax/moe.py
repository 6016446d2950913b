"""The mixture-of-experts feed-forward: route, dispatch, experts, combine, as one device's part of the work."""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.balance import LayerStats, sequence_balance
from moejax.config import ModelConfig
from moejax.dispatch import Assignments, Exchange, Experts, dispatch
from moejax.kernels.manual import vary, varying
from moejax.kernels.top_k_routing import Routing, RoutingSums, route_tokens
from moejax.mesh import TENSOR
from moejax.nn.experts import grouped_experts, split_experts, whole_experts
from moejax.nn.feed_forward import gated_swiglu, swiglu
from moejax.nn.scale import scaled
from moejax.nn.weights import compute_copy


def mixture_of_experts(
    p: dict[str, Any], x_bsD: jax.Array, m: ModelConfig, exchange: Exchange, *, by_sequence: bool = False
) -> tuple[jax.Array, LayerStats, Exchange]:
    """Sends each token of [b, s, D] to its experts.

    Returns the weighted results [b, s, D], sums over tokens, and the exchange for the next call in the same layer.

    Runs inside `shard_map`; `p` is one layer of `moejax.sharding.moe_params`, gathered. `by_sequence` says that the
    balance inside each sequence is asked for as well.
    """
    x_TD = x_bsD.reshape(-1, x_bsD.shape[-1])
    routing, sums = route(x_TD, p, m, num_sequences=x_bsD.shape[0])
    count_E = sums.count_bE.sum(0)
    experts = Experts(p["experts"], whole_experts if TENSOR in exchange.axes else split_experts, grouped_experts)
    y_TD, done, exchange = dispatch(x_TD, Assignments(*routing, count_E.astype(jnp.int32)), experts, exchange)
    if m.shared_d_ff:
        shared_expert = gated_swiglu if m.shared_gate else swiglu
        y_TD = y_TD + shared_expert(p["shared"], x_TD)
    with jax.named_scope("route"):
        of_sequences = sequence_balance(sums, x_bsD.shape[1]) if by_sequence else jnp.zeros_like(sums.z)
    stats = LayerStats(
        count_E, sums.prob_bE.sum(0), sums.z, sums.entropy, sums.invalid, of_sequences, done.dropped, done.rounds,
        dispatches=jnp.ones_like(done.rounds),
    )  # fmt: skip
    return y_TD.reshape(x_bsD.shape), jax.tree.map(lambda s: vary(s, varying(x_bsD)), stats), exchange


def route(x_TD: jax.Array, p: dict[str, Any], m: ModelConfig, num_sequences: int) -> tuple[Routing, RoutingSums]:
    """The experts of each token by the model's rule; the tokens are of `num_sequences` sequences, one after another."""
    routing, sums = route_tokens(
        x_TD,
        compute_copy(p["w_router_DE"], x_TD, p["w_router_DE"].dtype),
        p["router_bias_E"] if m.router.bias else None,
        experts_per_token=m.experts_per_token,
        score=m.router.score,
        renormalize=m.router.renormalize,
        num_sequences=num_sequences,
        num_groups=m.router.num_groups,
        groups_per_token=m.router.groups_per_token,
    )
    with jax.named_scope("route"):
        return routing._replace(gate_TK=scaled(routing.gate_TK, m.router.scaling)), sums
