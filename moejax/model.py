"""The per-device program: what one device does from tokens to loss, inside one `shard_map` over every mesh axis.

    embed -> (leading dense layers) -> pipeline of mixture-of-experts layers -> final norm -> logits -> loss

Every collective stands where it happens, by the name of its mesh axis; `check_vma=True` has autodiff add the gradient
sums. A single device runs the same program on the mesh (1, 1, 1).

Dimensions. Capitals are logical, lower case this device's part: B batch, b sequences of a microbatch, M microbatches,
S sequence, s = S / tensor, D model, V vocabulary, R repeats, L layers, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from moejax import balance, compiler, remat, sharding
from moejax.balance import ExpertLoadBalancer, LayerStats
from moejax.config import BalanceConfig, DispatchConfig, ModelConfig, ParallelConfig, TrainConfig, check
from moejax.dispatch import Exchange
from moejax.kernels.manual import vary
from moejax.mesh import EXPERT, PIPELINE, REPLICA, TENSOR, platform
from moejax.moe import global_stats, mixture_of_experts
from moejax.nn.attention import attention
from moejax.nn.collectives import all_gather
from moejax.nn.embedding import IGNORED, check_ids, cross_entropy, embed, logits, out_of_range
from moejax.nn.feed_forward import swiglu
from moejax.nn.loss_scale import loss_scale, scale_gradient
from moejax.nn.norm import rms_norm
from moejax.pipeline import run_pipeline

FORWARD_ONLY = "forward_only"  # the scope of a forward pass in a train step that is not differentiated
BATCH_ARRAYS = ("tokens", "targets", "segment_ids")
Batch = dict[str, jax.Array]  # `BATCH_ARRAYS`: int32 [B, S]; targets of `IGNORED` (-100) are left out of the loss
Metrics = dict[str, Any]  # arrays, and groups of them


class BatchTotals(NamedTuple):
    """Counts over the whole batch, of all devices and accumulation slices, that the losses of its parts divide by."""

    num_sequences: int
    num_tokens: int
    num_targets: jax.Array  # int32, those that the loss counts: all but `IGNORED`
    out_of_range_ids: jax.Array  # int32, tokens and counted targets that are not in the vocabulary
    count_RlE: jax.Array | None = None  # assignments to the experts of this stage's layers; None: the part is the whole

    @property
    def metrics(self) -> Metrics:
        return {"num_targets": self.num_targets, "out_of_range_ids": self.out_of_range_ids}


@dataclasses.dataclass(frozen=True)
class Program:
    """A model and how it is spread over a mesh. Its methods are the per-device functions; `sharded` runs them.

    On an abstract mesh (`moejax.mesh.abstract_mesh`) it can be traced, for any devices and any number of them.
    """

    model: ModelConfig
    mesh: Mesh | AbstractMesh
    dispatch: DispatchConfig = DispatchConfig()
    balance: BalanceConfig = BalanceConfig()
    parallel: ParallelConfig = ParallelConfig()
    compiler_options: tuple[str, ...] = ()  # those of `TrainConfig`

    def __post_init__(self) -> None:
        sharding.check_layout(self.model, self.dispatch, self.parallel, self.mesh)
        self.balance.check_moves_a_bias(self.model)

    @classmethod
    def from_config(cls, config: TrainConfig, mesh: Mesh | AbstractMesh) -> Program:
        """The program of a training configuration; the batch is checked as well."""
        sharding.check_layout(
            config.model, config.dispatch, config.parallel, mesh,
            batch_size=config.data.batch_size, seq_len=config.data.seq_len, accumulate=config.accumulate,
        )  # fmt: skip
        return cls(config.model, mesh, config.dispatch, config.balance, config.parallel, config.compiler_options)

    def without_drops(self) -> Program:
        """This program with a dispatch that drops nothing: what it computes then depends on no other sequence."""
        if self.dispatch.strategy != "capacity":
            return self
        return dataclasses.replace(self, dispatch=dataclasses.replace(self.dispatch, strategy="dropless"))

    def with_capacity(self, factor: float) -> Program:
        """This program with other buffers; where nothing is dropped, they change what it computes by rounding only."""
        return dataclasses.replace(self, dispatch=dataclasses.replace(self.dispatch, capacity_factor=factor))

    @functools.cached_property
    def balancer(self) -> ExpertLoadBalancer:
        """What keeps this program's experts evenly loaded; its state is part of the train state."""
        config = self.balance
        if not self.exchanges:  # no buffers, so no sizes of them
            config = dataclasses.replace(config, capacity_factors=())
        return ExpertLoadBalancer(self.model, config, self.dispatch)

    @property
    def exchanges(self) -> bool:
        """Whether tokens leave their device."""
        return self.mesh.shape[EXPERT] * self.mesh.shape[TENSOR] > 1

    @functools.cached_property
    def table(self) -> dict[str, Any]:
        """Every parameter by path: `moejax.sharding.Param`."""
        return sharding.param_table(self.model, self.dispatch, self.parallel, self.mesh)

    @functools.cached_property
    def param_specs(self) -> dict[str, Any]:
        return sharding.param_specs(self.table)

    @functools.cached_property
    def xla_options(self) -> dict[str, str | bool]:
        """What to compile with, as `jax.jit` takes it: `moejax.compiler`'s table, then `compiler_options`.

        Raises:
          ConfigError: the mesh's compiler refuses one of them.
        """
        options = compiler.program_options(platform(self.mesh), self.compiler_options)
        if isinstance(self.mesh, Mesh):
            compiler.check_accepted(self.mesh, options)
        return options

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The axes that split the batch."""
        return sharding.batch_axes(self.mesh)

    @property
    def skip_bubble(self) -> bool:
        """Whether stages without work skip it: `parallel.bubble` with "auto" resolved for the mesh's devices."""
        on_cpu = platform(self.mesh) == "cpu"
        return on_cpu if self.parallel.bubble == "auto" else self.parallel.bubble == "skip"

    def batch_split(self, num_sequences: int) -> int:
        """Parts of a microbatch of a device's `num_sequences`: `parallel.batch_split` with 0 (auto) resolved."""
        return self.parallel.parts(num_sequences, overlaps=self.exchanges and platform(self.mesh) != "cpu")

    @property
    def batch_spec(self) -> P:
        return P(self.batch_axes)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Float32 parameters, made where they are stored; the same key gives the same model on every mesh."""
        return sharding.init_params(self.table, self.mesh, key)

    def sharded(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """`function`, written for one device, as a function of global arrays."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)

    # What follows runs on one device's arrays.

    def totals(self, batch: Batch) -> BatchTotals:
        """Counts the global batch, of which `batch` has this device's sequences."""
        tokens_BS, targets_BS = batch["tokens"], batch["targets"]
        shards = math.prod(self.mesh.shape[a] for a in self.batch_axes)
        with jax.named_scope("loss"):
            counted_BS = targets_BS != IGNORED
            wrong_tokens_BS = out_of_range(tokens_BS, self.model.vocab_size)
            wrong_targets_BS = counted_BS & out_of_range(targets_BS, self.model.vocab_size)
            counts = [jnp.sum(x, dtype=jnp.int32) for x in (counted_BS, wrong_tokens_BS, wrong_targets_BS)]
            num_targets, wrong_tokens, wrong_targets = lax.psum(jnp.stack(counts), self.batch_axes)
            out_of_range_ids = wrong_tokens + wrong_targets
        return BatchTotals(tokens_BS.shape[0] * shards, tokens_BS.size * shards, num_targets, out_of_range_ids)

    def loss(self, params: dict[str, Any], batch: Batch) -> tuple[jax.Array, Metrics]:
        """Returns the mean cross-entropy in nats plus the router's losses, and figures; the same on every device.

        The mean is over the targets of the global batch that are not `IGNORED` (-100), and 0 where there are none. The
        router's losses and loads count every token, whatever its target.

        Args:
            params: this device's stored shards, float32.
            batch: this device's sequences, int32 [B / batch axes, S].
        """
        totals = self.totals(batch)
        loss, metrics = self.share_of_loss(params, batch, totals)
        return loss, metrics | totals.metrics

    def share_of_loss(self, params: dict[str, Any], batch: Batch, totals: BatchTotals) -> tuple[jax.Array, Metrics]:
        """Returns the share that this batch has in the loss over a larger one with these `totals`.

        The shares of all slices of a batch add up to its loss, and their gradients and metrics to its own.
        """
        scale = loss_scale(self.model.dtype, totals.num_tokens)
        params = jax.tree.map(lambda w: scale_gradient(w, 1 / scale), params)
        if REPLICA in self.mesh.axis_names:
            with jax.named_scope("gather"):  # gradients are summed over replicas once, and as they are stored
                params = jax.tree.map(lambda w: vary(w, (REPLICA,)), params)
        h_MbsD, stats = self.hidden(params, batch["tokens"], batch["segment_ids"])
        targets_MbS = batch["targets"].reshape(h_MbsD.shape[0], -1, batch["targets"].shape[-1])
        w_Dv = self._output_table(params)
        policy = self.parallel.remat_policy(targets_MbS.shape[-1])

        def microbatch(total: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            h_bsD, targets_bS = xs
            with jax.named_scope("logits"):
                logits_bSv = logits(all_gather(h_bsD, TENSOR, dim=1), w_Dv)
            return total + cross_entropy(logits_bSv, targets_bS), None

        zero = vary(jnp.zeros((), jnp.float32), self.batch_axes)
        total, _ = lax.scan(remat.checkpoint(microbatch, policy), zero, (h_MbsD, targets_MbS))
        with jax.named_scope("loss"):
            num_targets = jnp.maximum(totals.num_targets, 1).astype(jnp.float32)
            cross_entropy_mean = lax.psum(total, self.batch_axes) / num_targets
            weights = self.balance
            router_loss = (
                weights.aux_loss_weight * balance.load_balance_loss(stats, totals.num_tokens, totals.count_RlE)
                + weights.sequence_loss_weight * balance.sequence_balance_loss(stats, totals.num_sequences)
                + weights.z_loss_weight * balance.router_z_loss(stats, totals.num_tokens)
            )
            loss = cross_entropy_mean + lax.pmean(router_loss, PIPELINE)
        by_layer = jax.tree.map(lambda s_Rl: lax.stop_gradient(s_Rl)[:, None], stats)
        metrics = {"loss": loss, "cross_entropy": cross_entropy_mean, "router": by_layer}
        return scale_gradient(loss, scale), metrics

    def count_assignments(self, params: dict[str, Any], slices: Batch) -> jax.Array:
        """Counts the assignments to each expert of this stage's layers, [R, l, E], over all slices [A, B, S].

        This is a forward pass: the load-balance loss of a slice needs the counts of all.
        """

        def count(slice_: Batch) -> jax.Array:
            with jax.named_scope(FORWARD_ONLY):
                return self.hidden(params, slice_["tokens"], slice_["segment_ids"])[1].count_E

        return lax.map(count, slices).sum(0)

    @property
    def metric_specs(self) -> dict[str, P]:
        """How the figures that `loss` returns lie on the mesh: scalars everywhere, the router's with their layers."""
        names = ("loss", "cross_entropy", "num_targets", "out_of_range_ids")
        return dict.fromkeys(names, P()) | {"router": P(None, PIPELINE)}

    def logits(self, params: dict[str, Any], tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        """Logits of the token after every position of this device's sequences [B, S]: its columns, float32 [B, S, v].

        Over the mesh they lie as `logits_spec` says.
        """
        return logits(self._whole_hidden(params, tokens_BS, segment_ids_BS), self._output_table(params))

    @property
    def logits_spec(self) -> P:
        return P(self.batch_axes, None, sharding.VOCAB_AXES)

    def next_token_logits(self, params: dict[str, Any], tokens_BS: jax.Array, position: jax.Array) -> jax.Array:
        """Logits of the token after `position` in each of this device's sequences [B, S]: its columns [B, v]."""
        h_BSD = self._whole_hidden(params, tokens_BS, jnp.ones_like(tokens_BS))
        h_BD = lax.dynamic_index_in_dim(h_BSD, position, axis=1, keepdims=False)
        return logits(h_BD, self._output_table(params))

    def _whole_hidden(self, params: dict[str, Any], tokens_BS: jax.Array, segment_ids_BS: jax.Array) -> jax.Array:
        """Final hidden states of every position, gathered over `tensor`: [B, S, D]."""
        h_MbsD, _ = self.hidden(params, tokens_BS, segment_ids_BS)
        with jax.named_scope("logits"):
            return all_gather(h_MbsD, TENSOR, dim=2).reshape(*tokens_BS.shape, -1)

    def hidden(
        self, params: dict[str, Any], tokens_BS: jax.Array, segment_ids_BS: jax.Array
    ) -> tuple[jax.Array, LayerStats]:
        """Final hidden states [M, b, s, D], after the last norm, on every stage; and global sums of the router.

        The sums are of this stage's layers, [R, layers per chunk, ...], over every token of the batch.
        """
        m = self.model
        num_microbatches = self.parallel.num_microbatches
        policy = self.parallel.remat_policy(tokens_BS.shape[1])
        segment_ids_MbS = segment_ids_BS.reshape(num_microbatches, -1, segment_ids_BS.shape[1])
        layers = params["layers"]
        if self.parallel.gather == "step":
            layers = sharding.gather(layers, self.table["layers"])

        table_vD = sharding.gather(params["embed"], self.table["embed"])["table_VD"]
        x_BsD = embed(table_vD, tokens_BS, jnp.dtype(m.dtype), split_pipeline=m.num_dense_layers > 0)
        if m.num_dense_layers:
            x_BsD = self._dense_layers(params["dense_layers"], x_BsD, segment_ids_BS, policy)

        def stage(x_bsD: jax.Array, repeat: jax.Array, microbatch: jax.Array) -> tuple[jax.Array, LayerStats]:
            chunk = jax.tree.map(lambda w: lax.dynamic_index_in_dim(w[:, 0], repeat, keepdims=False), layers)
            segment_ids_bS = lax.dynamic_index_in_dim(segment_ids_MbS, microbatch, keepdims=False)
            layer = remat.checkpoint(functools.partial(self._layer, segment_ids_bS=segment_ids_bS), policy)
            return lax.scan(layer, x_bsD, chunk)

        x_MbsD = x_BsD.reshape(num_microbatches, -1, *x_BsD.shape[1:])
        with jax.named_scope("pipeline"):
            x_MbsD = vary(x_MbsD, (PIPELINE,))
        x_MbsD, stats = run_pipeline(
            stage,
            x_MbsD,
            self.parallel.repeats,
            skip_bubble=self.skip_bubble,
            checkpoint=functools.partial(remat.checkpoint, policy=policy),
        )
        with jax.named_scope("pipeline"):  # from stage 0 to all: each holds a part of the vocabulary
            x_MbsD = lax.psum(jnp.where(lax.axis_index(PIPELINE) == 0, x_MbsD, jnp.zeros_like(x_MbsD)), PIPELINE)
        norm_D = sharding.gather(params["head"]["norm_D"], self.table["head"]["norm_D"])
        with jax.named_scope("logits"):
            h_MbsD = rms_norm(x_MbsD, norm_D, m.norm_eps)
        return h_MbsD, global_stats(stats, (*self.batch_axes, TENSOR))

    def _layer(self, x_bsD: jax.Array, p: dict[str, Any], *, segment_ids_bS: jax.Array) -> tuple[jax.Array, LayerStats]:
        """One layer of the pipeline."""
        if self.parallel.gather == "layer":
            p = sharding.gather(p, self.table["layers"], unstacked=True)
        x_bsD = remat.named(x_bsD, remat.LAYER_INPUT)

        def part(
            x_bsD: jax.Array, segment_ids_bS: jax.Array, exchange: Exchange
        ) -> tuple[jax.Array, LayerStats, Exchange]:
            x_bsD = exchange.wait_for_previous(x_bsD)
            x_bsD = x_bsD + attention(p["attention"], x_bsD, segment_ids_bS, self.model)
            with jax.named_scope("route"):
                h_bsD = rms_norm(x_bsD, p["moe_norm_D"], self.model.norm_eps)
            by_sequence = self.balance.sequence_loss_weight > 0
            y_bsD, stats, exchange = mixture_of_experts(p["moe"], h_bsD, self.model, exchange, by_sequence=by_sequence)
            return x_bsD + y_bsD, stats, exchange

        # No part needs another's results, so the compiler can run one's products while it exchanges another's tokens.
        num_parts = self.batch_split(x_bsD.shape[0])
        split = functools.partial(jnp.split, indices_or_sections=num_parts)
        num_tokens = x_bsD.shape[0] * x_bsD.shape[1] // num_parts
        exchange = Exchange.make(self.dispatch, self.model, num_tokens, hosts=self.dispatch.hosts)
        parts, stats = [], []
        for inputs in zip(split(x_bsD), split(segment_ids_bS), strict=True):
            y_bsD, sums, exchange = part(*inputs, exchange)
            parts.append(y_bsD)
            stats.append(sums)
        return jnp.concatenate(parts), jax.tree.map(lambda *sums: sum(sums), *stats)

    def _dense_layers(
        self, stacked: dict[str, Any], x_bsD: jax.Array, segment_ids_BS: jax.Array, policy: str
    ) -> jax.Array:
        """The leading dense layers, each stage on its share of the batch, which is gathered over stages after them."""
        start = lax.axis_index(PIPELINE) * x_bsD.shape[0]
        segment_ids_bS = lax.dynamic_slice_in_dim(segment_ids_BS, start, x_bsD.shape[0])

        def layer(x_bsD: jax.Array, p: dict[str, Any]) -> tuple[jax.Array, None]:
            p = sharding.gather(p, self.table["dense_layers"], unstacked=True)
            x_bsD = remat.named(x_bsD, remat.LAYER_INPUT)
            x_bsD = x_bsD + attention(p["attention"], x_bsD, segment_ids_bS, self.model)
            with jax.named_scope("expert"):
                h_bsD = rms_norm(x_bsD, p["feed_forward_norm_D"], self.model.norm_eps)
            return x_bsD + swiglu(p["feed_forward"], h_bsD), None

        x_bsD, _ = lax.scan(remat.checkpoint(layer, policy), x_bsD, stacked)
        with jax.named_scope("pipeline"):
            return all_gather(x_bsD, PIPELINE, dim=0)

    def _output_table(self, params: dict[str, Any]) -> jax.Array:
        """This device's columns of the output layer, [D, v]."""
        if self.model.tie_embeddings:
            return sharding.gather(params["embed"], self.table["embed"])["table_VD"].T
        return sharding.gather(params["head"]["w_DV"], self.table["head"]["w_DV"])


def check_batch(batch: Mapping[str, Any], vocab_size: int) -> None:
    """Raises `ConfigError` for a batch that lacks an array, or has other shapes than [B, S] or ids out of range.

    The program counts what cannot be checked here (see `moejax.nn.embedding.check_ids`) as `out_of_range_ids`.
    """
    missing = [name for name in BATCH_ARRAYS if name not in batch]
    check(not missing, f"the batch has {', '.join(batch) or 'no arrays'} and lacks {', '.join(missing)}")
    shapes = {name: np.shape(batch[name]) for name in BATCH_ARRAYS}
    check(
        len(set(shapes.values())) == 1 and len(shapes["tokens"]) == 2,
        f"the batch's shapes {shapes} must be the same [B, S] for all",
    )
    check_ids("tokens", batch["tokens"], vocab_size)
    check_ids("targets", batch["targets"], vocab_size, may_ignore=True)


def counted_targets(batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the targets of a host's batch that the loss counts, in one dim."""
    return batch["targets"][batch["targets"] != IGNORED]


def summarize(metrics: Metrics, batch: Batch) -> Metrics:
    """Returns the figures of `Program.loss`, as global arrays, with the router's sums over the batch in a few numbers.

    `aux_loss`, `sequence_loss` and `z_loss` are its losses before their weights. The counts become `load_LE`, the
    assignments that each expert got, and `moejax.balance.load_statistics` of them. `invalid_tokens` is over layers:
    those whose router logits are not finite.
    """
    router, tokens_BS = metrics["router"], batch["tokens"]
    load_LE = router.count_E.reshape(-1, router.count_E.shape[-1])
    statistics = balance.load_statistics(load_LE, router.dropped, router.rounds / router.dispatches)
    statistics |= {
        "aux_loss": balance.load_balance_loss(router, tokens_BS.size),
        "sequence_loss": balance.sequence_balance_loss(router, tokens_BS.shape[0]),
        "z_loss": balance.router_z_loss(router, tokens_BS.size),
    }
    statistics |= {"invalid_tokens": router.invalid.sum(), "load_LE": load_LE}
    return {k: v for k, v in metrics.items() if k != "router"} | statistics
