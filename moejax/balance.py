"""Expert load: the router's losses and what is reported of its balance, all from global sums.

Dimensions: L mixture-of-experts layers, E experts.
"""

import jax

from moejax.nn.router import RouterStats


def load_balance_loss(stats: RouterStats, num_tokens: int) -> jax.Array:
    """Mean over layers of E Σ_e f_e P_e (Switch, arXiv 2101.03961, eq. 4): 1 when balanced.

    f is the share of assignments an expert gets, P its mean probability, both over every token of the batch on every
    device: `stats` holds global sums, [..., E] and [...] with the layers in front.
    """
    share_LE = stats.count_E / stats.count_E.sum(-1, keepdims=True)
    prob_LE = stats.prob_E / num_tokens
    return share_LE.shape[-1] * (share_LE * prob_LE).sum(-1).mean()


def router_z_loss(stats: RouterStats, num_tokens: int) -> jax.Array:
    """Mean over layers and tokens of the squared log-sum-exp of the router's logits (ST-MoE, 2202.08906, eq. 5)."""
    return (stats.z / num_tokens).mean()


def load_statistics(count_LE: jax.Array, dropped_L: jax.Array) -> dict[str, jax.Array]:
    """Balance over the window that the counts were taken in, here one optimizer step.

    `load_cv` is the coefficient of variation over experts, averaged over layers; hold it against `load_cv_floor`.
    `load_max_over_mean` is that of the worst layer; `dropped_fraction` is over all assignments.
    """
    mean_L = count_LE.mean(-1)
    cv = (count_LE.std(-1) / mean_L).mean()
    return {
        "load_cv": cv,
        "load_max_over_mean": (count_LE.max(-1) / mean_L).max(),
        "dropped_fraction": dropped_L.sum() / count_LE.sum(),
    }


def load_cv_floor(num_tokens: int, experts_per_token: int, num_experts: int) -> float:
    """The load CV of a uniformly random router over a window of `num_tokens` tokens: sampling noise alone."""
    p = experts_per_token / num_experts
    return ((1 - p) / (num_tokens * p)) ** 0.5
