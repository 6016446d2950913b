"""The model, as one device computes it: from its tokens to its slice's share of the loss.

Every device runs these functions on its own arrays, inside one `jax.shard_map` over all axes of the mesh, which
`moejax.program` sets up. The batch axes, expert and replica (if the mesh has one), split the batch's sequences. Devices
along pipeline and tensor have the same sequences: pipeline splits layers, tensor splits sequences and heads, and both
together split the vocabulary.

These are the collectives of a step, but for small ones of counts inside `dispatch`. Autodiff adds their transposes (of
an all_gather, a psum_scatter), and a psum of each gradient over the axes along which its parameter is the same. On one
device they do nothing.

    gather        shards of weights -> weights         all_gather over expert
                  of shared experts, down-projections  all_gather over expert and tensor
                  of dense layers                      all_gather over expert, pipeline, and (feed-forwards) tensor
                  routed experts, vectors of heads     none: they are used where they are stored
    embed         tokens [n, S] -> [n, s, D]           psum_scatter over tensor; psum over pipeline
                  before dense layers: -> [q, s, D]    psum_scatter over tensor; psum_scatter over pipeline
    dense_layers  each stage runs q sequences          all_gather over pipeline afterward
    layer         attention: [b, s, D] -> [b, S, D] -> [b, s, D]    all_gather before, psum_scatter after, over tensor
                  QK-norm, where it spans all heads as one vector   pmean over tensor
                  experts: tokens to them and back     all_to_all over the experts' axes: expert and tensor; or expert,
                                                       with all_gather before, psum_scatter after, over tensor
                  loss of balance inside sequences     psum over tensor of a sequence's counts
    run_pipeline  a microbatch to the next stage       ppermute over pipeline; the last stage's goes to stage 0
                  stage 0's results to all stages      psum over pipeline
    hidden        the router's sums over tokens        psum over batch axes and tensor
    loss          logits [b, S, v] of a microbatch     all_gather over tensor; pmax and psum over pipeline and tensor
                  cross-entropy; router's losses       psum over batch axes; psum over pipeline

An optimizer step runs its batch in slices (gradient accumulation). A device has n sequences of a slice. They pass
through the pipeline, GPipe or interleaved, in M microbatches of b, and through a layer in `batch_split` parts of those.

Dimensions end a name: x_bsD is [b, s, D]. A parameter's name gives its global shape, of which a device has a shard.
S tokens of a sequence, s = S / tensor; D width of the model; V vocabulary with padding, v = V / (pipeline × tensor);
E experts; q = n / pipeline. Layers of the pipeline are stacked as [R, 1, l]: R chunks on each stage (more than 1:
interleaved), the device's own stage, l layers of a chunk. If they don't divide evenly, the last chunks have fewer.

    m, layout          the model's sizes; the parallel layout, with every "auto" resolved
    params, table      this device's shards, in float32, which products but the router's cast to the model's dtype;
                       and a `moejax.sharding.Param` for each, which says the axes to gather it over
    sharding.gather    all-gathers weights; `unstacked` inside a scan, where the dims R, 1 and l are gone already
    layout.gather      "step": gathers the layers' weights once per slice; "layer": each layer's just before it runs,
                       again for each microbatch and each rematerialization. A dense layer's: just before it runs
    scaled             x times a constant of the model's
    remat              `checkpoint` rematerializes by a policy; `named` names what a policy may keep
    exchange           sends tokens to their experts by `layout.dispatch`: dropless, ragged or capacity; in one hop, or
                       inside a host and then between hosts
    LayerStats         a layer's sums over tokens, for the router's losses
    totals             counts over the whole batch; where several slices share a router's loss, also `count_RlE`: the
                       assignments to the experts of this stage's layers, counted by a forward pass beforehand
    named_scope        the phase that an operation counts toward in profiles: "expert" is any feed-forward, "route" the
                       router and its sums, "gather" what prepares weights; a norm counts toward what it feeds
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax import remat, sharding
from moejax.balance import LayerStats, router_loss
from moejax.batch import Batch, Totals
from moejax.config import BalanceConfig, ModelConfig
from moejax.dispatch import Exchange
from moejax.layout import Layout
from moejax.mesh import PIPELINE, TENSOR
from moejax.metrics import LossMetrics
from moejax.moe import mixture_of_experts
from moejax.nn.attention import attention
from moejax.nn.collectives import all_gather
from moejax.nn.embedding import cross_entropy, logits
from moejax.nn.embedding import embed as embed_tokens
from moejax.nn.feed_forward import swiglu
from moejax.nn.norm import rms_norm
from moejax.nn.scale import scaled
from moejax.pipeline import run_chunk, run_pipeline

Params = dict[str, Any]  # nested as `moejax.sharding.param_table` is


def embed(params: Params, tokens_nS: jax.Array, m: ModelConfig, table: Params) -> jax.Array:
    """Looks up this device's sequences: [n, s, D], or, split over pipeline for the dense layers, [q, s, D]."""
    embedding_vD = sharding.gather(params["embed"], table["embed"])["table_VD"]
    x = embed_tokens(
        embedding_vD, tokens_nS, jnp.dtype(m.dtype), vocab_size=m.vocab_size, split_pipeline=m.num_dense_layers > 0
    )
    return scaled(x, m.embedding_multiplier)


def dense_layers(
    params: Params, x_qsD: jax.Array, segment_ids_nS: jax.Array, m: ModelConfig, layout: Layout, table: Params
) -> jax.Array:
    """Applies the leading dense layers, each stage to its q = n / pipeline sequences; then all stages gather all n."""
    q = x_qsD.shape[0]
    segment_ids_qS = lax.dynamic_slice_in_dim(segment_ids_nS, lax.axis_index(PIPELINE) * q, q)

    def dense_layer(x_qsD: jax.Array, p: Params) -> tuple[jax.Array, None]:
        p = sharding.gather(p, table["dense_layers"], unstacked=True)
        x_qsD = remat.named(x_qsD, remat.LAYER_INPUT)
        x_qsD = x_qsD + scaled(attention(p["attention"], x_qsD, segment_ids_qS, m), m.residual_multiplier)
        with jax.named_scope("expert"):
            h_qsD = rms_norm(x_qsD, p["feed_forward_norm_D"], m.norm_eps)
        return x_qsD + scaled(swiglu(p["feed_forward"], h_qsD), m.residual_multiplier), None

    x_qsD, _ = lax.scan(remat.checkpoint(dense_layer, layout.remat), x_qsD, params["dense_layers"])
    with jax.named_scope("pipeline"):
        return all_gather(x_qsD, PIPELINE, dim=0)


def layer(
    x_bsD: jax.Array, p: Params, segment_ids_bS: jax.Array, m: ModelConfig, layout: Layout, table: Params,
    by_sequence: bool,
) -> tuple[jax.Array, LayerStats]:  # fmt: skip
    """Applies attention and experts. Returns [b, s, D], and sums over these tokens for the router's losses.

    The sequences are in `layout.batch_split` independent parts, so that one part's attention overlaps another's
    all_to_all. `wait_for_previous` orders them: a part starts once the one before has its first buffer to send.
    """
    if layout.gather == "layer":
        p = sharding.gather(p, table["layers"], unstacked=True)
    x_bsD = remat.named(x_bsD, remat.LAYER_INPUT)
    exchange = Exchange.make(layout.dispatch, m, layout.tokens_per_part, layout.exchange_hosts)
    split = functools.partial(jnp.split, indices_or_sections=layout.batch_split)
    parts, stats = [], []
    for part_bsD, ids_bS in zip(split(x_bsD), split(segment_ids_bS), strict=True):
        part_bsD = exchange.wait_for_previous(part_bsD)
        part_bsD = part_bsD + scaled(attention(p["attention"], part_bsD, ids_bS, m), m.residual_multiplier)
        with jax.named_scope("route"):
            h_bsD = rms_norm(part_bsD, p["moe_norm_D"], m.norm_eps)
        y_bsD, sums, exchange = mixture_of_experts(p["moe"], h_bsD, m, exchange, by_sequence=by_sequence)
        parts.append(part_bsD + scaled(y_bsD, m.residual_multiplier))
        stats.append(sums)
    return jnp.concatenate(parts), jax.tree.map(lambda *of_parts: sum(of_parts), *stats)


def hidden(
    params: Params, tokens_nS: jax.Array, segment_ids_nS: jax.Array, m: ModelConfig, layout: Layout, table: Params,
    by_sequence: bool = False,
) -> tuple[jax.Array, LayerStats]:  # fmt: skip
    """Computes the final hidden states of this device's sequences, [M, b, s, D], the same on every stage.

    Also returns sums over every token of the slice for the router's losses, of this stage's layers: [R, l, ...].
    """
    layers = params["layers"]
    if layout.gather == "step":
        layers = sharding.gather(layers, table["layers"])
    x = embed(params, tokens_nS, m, table)
    x_nsD = dense_layers(params, x, segment_ids_nS, m, layout, table) if m.num_dense_layers else x
    x_MbsD = x_nsD.reshape(layout.num_microbatches, -1, *x_nsD.shape[1:])
    segment_ids_MbS = segment_ids_nS.reshape(layout.num_microbatches, -1, segment_ids_nS.shape[1])

    def stage(x_bsD: jax.Array, chunk: jax.Array, microbatch: jax.Array) -> tuple[jax.Array, LayerStats]:
        """One chunk of this stage's layers, on one microbatch."""
        p_l = jax.tree.map(lambda w_R1l: lax.dynamic_index_in_dim(w_R1l[:, 0], chunk, keepdims=False), layers)
        segment_ids_bS = lax.dynamic_index_in_dim(segment_ids_MbS, microbatch, keepdims=False)

        def stage_layer(x_bsD: jax.Array, p: Params) -> tuple[jax.Array, LayerStats]:
            return layer(x_bsD, p, segment_ids_bS, m, layout, table, by_sequence)

        return run_chunk(stage_layer, x_bsD, p_l, chunk, m.num_moe_layers, layout)

    x_MbsD, stats = run_pipeline(stage, x_MbsD, layout)
    norm_D = sharding.gather(params["head"]["norm_D"], table["head"]["norm_D"])
    with jax.named_scope("logits"):
        h_MbsD = rms_norm(x_MbsD, norm_D, m.norm_eps)
    with jax.named_scope("route"):
        return h_MbsD, lax.psum(stats, (*layout.mesh.batch_axes, TENSOR))


def output_weights(params: Params, m: ModelConfig, table: Params) -> jax.Array:
    """Returns this device's columns of the output layer, [D, v], already divided by the model's `logits_divisor`."""
    if m.tie_embeddings:
        w_Dv = sharding.gather(params["embed"], table["embed"])["table_VD"].T
    else:
        w_Dv = sharding.gather(params["head"]["w_DV"], table["head"]["w_DV"])
    with jax.named_scope("gather"):
        return scaled(w_Dv, 1 / m.logits_divisor)


def loss(
    params: Params, batch: Batch, totals: Totals, m: ModelConfig, layout: Layout, table: Params, balance: BalanceConfig
) -> tuple[jax.Array, LossMetrics]:
    """Returns this slice's share of the batch's loss, the same on every device, and metrics.

    The loss is the mean cross-entropy in nats per target, plus the router's losses, weighted as `balance` says. The
    shares of a batch's slices add up to its loss, their gradients to its gradient, and their metrics to its metrics.
    Each stage reports the metric `router` of its own layers.
    """
    by_sequence = balance.sequence_loss_weight > 0
    h_MbsD, stats = hidden(params, batch["tokens"], batch["segment_ids"], m, layout, table, by_sequence)
    targets_MbS = batch["targets"].reshape(*h_MbsD.shape[:2], -1)
    w_Dv = output_weights(params, m, table)

    def microbatch_loss(microbatch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Sums the cross-entropy of this device's sequences of one microbatch."""
        h_bsD, targets_bS = microbatch
        with jax.named_scope("logits"):
            logits_bSv = logits(all_gather(h_bsD, TENSOR, dim=1), w_Dv, m.vocab_size)
        return cross_entropy(logits_bSv, targets_bS, m.vocab_size)

    sum_M = lax.map(remat.checkpoint(microbatch_loss, layout.remat), (h_MbsD, targets_MbS))
    with jax.named_scope("loss"):
        num_targets = jnp.maximum(totals.num_targets, 1).astype(jnp.float32)
        cross_entropy_mean = lax.psum(sum_M.sum(), layout.mesh.batch_axes) / num_targets
        router_Rl = router_loss(stats, balance, totals.num_tokens, totals.num_sequences, totals.count_RlE)
        mean = cross_entropy_mean + lax.psum(router_Rl.sum() / m.num_moe_layers, PIPELINE)
    by_layer = jax.tree.map(lambda s_Rl: lax.stop_gradient(s_Rl)[:, None], stats)  # [R, 1, l, ...]
    return mean, {"loss": mean, "cross_entropy": cross_entropy_mean, "router": by_layer}
