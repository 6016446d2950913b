"""The mixture-of-experts feed-forward: route, dispatch, experts, combine, as one device's part of the work."""

from typing import Any

import jax
from jax import lax

from moejax.config import DispatchConfig, ModelConfig
from moejax.dispatch import get_dispatcher
from moejax.mesh import TENSOR
from moejax.nn.experts import split_experts, whole_experts
from moejax.nn.feed_forward import swiglu
from moejax.nn.router import RouterStats, route


def mixture_of_experts(
    p: dict[str, Any], x_bsD: jax.Array, m: ModelConfig, dispatch: DispatchConfig
) -> tuple[jax.Array, RouterStats]:
    """Sends each token of [b, s, D] to its experts and returns the weighted results, and sums over these tokens.

    Runs inside `shard_map`; `p` is one layer of `moejax.sharding.moe_params`, gathered.
    """
    x_TD = x_bsD.reshape(-1, x_bsD.shape[-1])
    routing, stats = route(x_TD, p["w_router_DE"], m.experts_per_token)
    y_TD, dropped = get_dispatcher(dispatch)(
        x_TD,
        routing,
        whole_experts if TENSOR in dispatch.expert_axes else split_experts,
        p["experts"],
        num_experts=m.num_experts,
        capacity=dispatch.capacity(x_TD.shape[0], m),
        expert_axes=dispatch.expert_axes,
    )
    if m.shared_d_ff:
        y_TD = y_TD + swiglu(p["shared"], x_TD)
    return y_TD.reshape(x_bsD.shape), stats._replace(dropped=dropped)


def global_stats(stats: RouterStats, token_axes: tuple[str, ...]) -> RouterStats:
    """Adds the sums up over every device that holds other tokens, so that no two devices disagree on them."""
    return jax.tree.map(lambda s: lax.psum(s, token_axes), stats)
