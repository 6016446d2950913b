"""The metrics of a step, by name: what each is, and how they are made from the sums that devices return.

All are the same on every device. Those without another dtype are float32 scalars.

Dimensions: L mixture-of-experts layers, E experts, R chunks of layers per stage, l layers of a chunk.
"""

from __future__ import annotations

from typing import Any, TypedDict, cast

import jax

from moejax import balance
from moejax.balance import BalanceReport, LayerStats
from moejax.batch import Batch


class LossMetrics(TypedDict):
    """What `moejax.model.loss` returns beside the loss, before the router's sums are summarized."""

    loss: jax.Array  # cross-entropy plus the router's losses by their weights
    cross_entropy: jax.Array  # nats per target
    router: LayerStats  # sums over the batch, [R, 1, l, ...] on a device, [R, stages, l, ...] over the mesh; 0 if empty


class EvalMetrics(TypedDict):
    """What `TrainStep.evaluate` and `Transformer.loss` return. The router's losses are before their weights."""

    loss: jax.Array
    cross_entropy: jax.Array
    num_targets: jax.Array  # int32, that the cross-entropy is a mean over
    out_of_range_ids: jax.Array  # int32, which is 0 unless the loss is wrong
    aux_loss: jax.Array
    sequence_loss: jax.Array
    z_loss: jax.Array
    load_cv: jax.Array  # of the tokens per expert, mean over layers
    load_max_over_mean: jax.Array  # of the worst layer
    dropped_fraction: jax.Array  # of all assignments
    rounds: jax.Array  # mean per dispatch
    invalid_tokens: jax.Array  # over layers, those whose router logits are not finite
    load_LE: jax.Array  # assignments that each expert got


class StepMetrics(EvalMetrics):
    """What a train step returns; and the `window_` scalars of `BalanceReport.scalars`, which are not listed here."""

    grad_norm: jax.Array  # before clipping
    learning_rate: jax.Array
    balance: BalanceReport  # of the balancer's window, by layer
    capacity_factor: jax.Array  # that this step was compiled with
    next_capacity_index: jax.Array  # int32, which of the balancer's capacity factors it wants next


def summarize(metrics: dict[str, Any], batch: Batch, num_layers: int) -> EvalMetrics:
    """Returns global metrics of a loss with the router's sums over the batch in a few numbers; others stay.

    Args:
        metrics: `LossMetrics` and any others, as global arrays.
        batch: of the whole mesh.
        num_layers: of the model, those with experts.
    """
    router, tokens_BS = metrics["router"].in_order(num_layers), batch["tokens"]
    load_LE = router.count_E
    statistics = balance.load_statistics(load_LE, router.dropped, router.rounds / router.dispatches)
    statistics |= {
        "aux_loss": balance.load_balance_loss(router, tokens_BS.size).mean(),
        "sequence_loss": balance.sequence_balance_loss(router, tokens_BS.shape[0]).mean(),
        "z_loss": balance.router_z_loss(router, tokens_BS.size).mean(),
    }
    statistics |= {"invalid_tokens": router.invalid.sum(), "load_LE": load_LE}
    return cast(EvalMetrics, {k: v for k, v in metrics.items() if k != "router"} | statistics)
