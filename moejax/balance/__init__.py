"""Even loads: the router's losses, the balancer that watches and corrects, and where experts stand when serving."""

from moejax.balance.balancer import BalanceReport, BalanceState, ExpertLoadBalancer
from moejax.balance.bounds import BoundWatch, Figure
from moejax.balance.losses import (
    LayerStats,
    load_balance_loss,
    load_cv_floor,
    load_statistics,
    router_loss,
    router_z_loss,
    sequence_balance,
    sequence_balance_loss,
)

__all__ = [
    "BalanceReport",
    "BalanceState",
    "BoundWatch",
    "ExpertLoadBalancer",
    "Figure",
    "LayerStats",
    "load_balance_loss",
    "load_cv_floor",
    "load_statistics",
    "router_loss",
    "router_z_loss",
    "sequence_balance",
    "sequence_balance_loss",
]
