"""The router's losses and the figures of one step, all from global sums.

Dimensions: L mixture-of-experts layers, E experts, b sequences of one device.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from moejax.config import BalanceConfig
from moejax.kernels.top_k_routing import RoutingSums
from moejax.mesh import TENSOR
from moejax.remat import NETWORK, named


class LayerStats(NamedTuple):
    """Sums over one device's tokens in one layer, float32; added up over devices and microbatches, the global figures.

    `invalid` counts tokens whose router logits are not finite, `dropped` assignments that reached no expert. `rounds`
    over `dispatches` is the mean number of rounds that a dispatch took.
    """

    count_E: jax.Array
    prob_E: jax.Array
    z: jax.Array
    entropy: jax.Array
    invalid: jax.Array
    sequence_balance: jax.Array
    dropped: jax.Array
    rounds: jax.Array
    dispatches: jax.Array

    def in_order(self, num_layers: int) -> LayerStats:
        """Returns the sums of the whole mesh, stacked as [R, stages, l, ...], as [L, ...]: without empty places."""
        return LayerStats(*(x.reshape(-1, *x.shape[3:])[:num_layers] for x in self))


def load_balance_loss(stats: LayerStats, num_tokens: int, count_LE: jax.Array | None = None) -> jax.Array:
    """Returns E Σ_e f_e P_e of each layer (Switch, arXiv 2101.03961, eq. 4): 1 when balanced, 0 in empty places.

    f is the share of assignments an expert gets, P its mean probability, both over every token of the batch on every
    device: `stats` holds global sums, [..., E] and [...] with the layers in front.

    f has no gradient, and the loss is linear in P. So the loss of a batch is the sum of this over its slices, where
    `stats` are of the slice, and `num_tokens` and the assignments `count_LE` of the whole batch.
    """
    count_LE = stats.count_E if count_LE is None else count_LE
    share_LE = count_LE / jnp.maximum(count_LE.sum(-1, keepdims=True), 1)
    prob_LE = stats.prob_E / num_tokens
    return share_LE.shape[-1] * (share_LE * prob_LE).sum(-1)


def sequence_balance(sums: RoutingSums, local_seq_len: int) -> jax.Array:
    """This device's part of Σ_sequences E Σ_e f_e P_e, with f and P over one sequence (DeepSeek-V3, eq. 17).

    A sequence is spread over `tensor`, so its sums are added up over that axis, and each of its devices takes an equal
    part of the result.
    """
    num_devices = lax.axis_size(TENSOR)
    count_bE, prob_bE = (
        named(lax.psum(x_bE, TENSOR), NETWORK) for x_bE in (lax.stop_gradient(sums.count_bE), sums.prob_bE)
    )
    share_bE = count_bE / count_bE.sum(-1, keepdims=True)
    prob_bE = prob_bE / (local_seq_len * num_devices)
    return share_bE.shape[-1] * (share_bE * prob_bE).sum() / num_devices


def sequence_balance_loss(stats: LayerStats, num_sequences: int) -> jax.Array:
    """Returns each layer's mean over sequences of the balance inside a sequence: 1 when balanced."""
    return stats.sequence_balance / num_sequences


def router_z_loss(stats: LayerStats, num_tokens: int) -> jax.Array:
    """Returns each layer's mean over tokens of its logits' squared log-sum-exp (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return stats.z / num_tokens


def router_loss(
    stats: LayerStats, config: BalanceConfig, num_tokens: int, num_sequences: int, count_LE: jax.Array | None = None
) -> jax.Array:
    """Returns the sum of each layer's router losses by their weights in `config`, for a batch of these counts.

    Where `stats` are of a slice of the batch, `count_LE` are the assignments of the whole; see `load_balance_loss`.
    """
    return (
        config.aux_loss_weight * load_balance_loss(stats, num_tokens, count_LE)
        + config.sequence_loss_weight * sequence_balance_loss(stats, num_sequences)
        + config.z_loss_weight * router_z_loss(stats, num_tokens)
    )


def load_statistics(count_LE: jax.Array, dropped_L: jax.Array, rounds_L: jax.Array) -> dict[str, jax.Array]:
    """Balance of one step; `moejax.balance.BalanceReport` tells it over a window of many.

    `load_cv` is the coefficient of variation over experts, averaged over layers; hold it against `load_cv_floor`.
    `load_max_over_mean` is that of the worst layer; `dropped_fraction` is over all assignments; `rounds` is the mean
    number of rounds that a dispatch took.
    """
    mean_L = count_LE.mean(-1)
    cv = (count_LE.std(-1) / mean_L).mean()
    return {
        "load_cv": cv,
        "load_max_over_mean": (count_LE.max(-1) / mean_L).max(),
        "dropped_fraction": dropped_L.sum() / count_LE.sum(),
        "rounds": jnp.mean(rounds_L),
    }


def load_cv_floor(num_tokens: float, experts_per_token: int, num_experts: int) -> float:
    """The load CV of a uniformly random router over a window of `num_tokens` tokens: sampling noise alone."""
    p = experts_per_token / num_experts
    return ((1 - p) / (num_tokens * p)) ** 0.5
