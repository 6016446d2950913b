"""The wiring: a model on a mesh. How its arrays are placed, how it is compiled, and `moejax.model` with that filled in.

program = moejax.Program(model, moejax.Layout(moejax.MeshConfig(expert=4, pipeline=2, tensor=2)))
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import compiler, sharding
from moejax import model as per_device
from moejax.balance import ExpertLoadBalancer
from moejax.batch import BATCH_ARRAYS, Batch, Totals, count_totals
from moejax.checks import check
from moejax.config import BalanceConfig, ModelConfig
from moejax.kernels.manual import vary
from moejax.layout import VOCAB_AXES, Layout
from moejax.mesh import PIPELINE, REPLICA, TENSOR, build_mesh, platform
from moejax.metrics import LossMetrics
from moejax.model import Params
from moejax.nn.collectives import all_gather
from moejax.nn.embedding import logits
from moejax.nn.loss_scale import loss_scale, scale_gradient

FORWARD_ONLY = "forward_only"  # the scope of a forward pass in a train step that is not differentiated


@dataclasses.dataclass(frozen=True)
class Program:
    """A model, its layout, and the devices. Its methods are per-device functions; `sharded` runs them over the mesh.

    Without `mesh`, it is built of all devices. On an abstract mesh (`moejax.mesh.abstract_mesh`) the program can be
    traced, for any devices and any number of them.

    Raises:
      ConfigError: the model does not fit the layout, or `mesh` is another than the layout's.
    """

    model: ModelConfig
    layout: Layout = Layout()
    mesh: Mesh | AbstractMesh = None  # type: ignore[assignment]  # made in __post_init__
    balance: BalanceConfig = BalanceConfig()
    compiler_options: tuple[str, ...] = ()  # those of `TrainConfig`

    def __post_init__(self) -> None:
        self.layout.check(self.model)
        self.balance.check_moves_a_bias(self.model)
        if self.mesh is None:
            object.__setattr__(self, "mesh", build_mesh(self.layout.mesh))
        have, want = dict(self.mesh.shape), self.layout.mesh.shape
        check(have == want, f"mesh={have} must have the axes of layout.mesh={want}")

    def with_layout(self, **fields: Any) -> Program:
        """Returns the program with other fields of its layout (`Layout.replace`), on the same devices."""
        return dataclasses.replace(self, layout=self.layout.replace(**fields))

    def for_batch(self, batch_size: int, seq_len: int) -> Program:
        """Returns the program for batches of another shape, in one forward pass; parameters are the same.

        Raises:
          ConfigError: such a batch does not fit the layout.
        """
        return self.with_layout(batch_size=batch_size, seq_len=seq_len, grad_accumulation_steps=1)

    def without_drops(self) -> Program:
        """This program with a dispatch that drops nothing: what it computes then depends on no other sequence."""
        return self.with_layout(strategy="dropless") if self.layout.dispatch.strategy == "capacity" else self

    @functools.cached_property
    def balancer(self) -> ExpertLoadBalancer:
        """What keeps this program's experts evenly loaded; its state is part of the train state."""
        config = self.balance
        if not self.layout.exchanges:  # no buffers, so no sizes of them
            config = dataclasses.replace(config, capacity_factors=())
        return ExpertLoadBalancer(self.model, config, self.layout.dispatch)

    @functools.cached_property
    def resolved(self) -> Layout:
        """The layout with every "auto" resolved for the mesh's devices."""
        return self.layout.resolve(platform(self.mesh))

    @functools.cached_property
    def table(self) -> dict[str, Any]:
        """Every parameter by path: `moejax.sharding.Param`."""
        return sharding.param_table(self.model, self.layout)

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
    def batch_spec(self) -> P:
        return P(self.layout.mesh.batch_axes)

    @property
    def batch_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as `jax.ShapeDtypeStruct`s."""
        placed = NamedSharding(self.mesh, self.batch_spec)
        shape = jax.ShapeDtypeStruct((self.layout.batch_size, self.layout.seq_len), jnp.int32, sharding=placed)
        return dict.fromkeys(BATCH_ARRAYS, shape)

    @property
    def logits_spec(self) -> P:
        return P(self.layout.mesh.batch_axes, None, VOCAB_AXES)

    @property
    def metric_specs(self) -> dict[str, P]:
        """How the figures that `loss` returns lie on the mesh: scalars everywhere, the router's with their layers."""
        names = ("loss", "cross_entropy", "num_targets", "out_of_range_ids")
        return dict.fromkeys(names, P()) | {"router": P(None, PIPELINE)}

    def init(self, key: jax.Array) -> Params:
        """Float32 parameters, made where they are stored; the same key gives the same model on every mesh."""
        return sharding.init_params(self.table, self.mesh, key)

    def sharded(self, function: Any, in_specs: Any, out_specs: Any) -> Any:
        """`function`, written for one device, as a function of global arrays."""
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True)

    # What follows runs on one device's arrays.

    def loss(self, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, Any]]:
        """Returns the mean cross-entropy in nats plus the router's losses, and figures; the same on every device.

        The mean is over the targets of the global batch that are not -100, and 0 where there are none. The router's
        losses and loads count every token, whatever its target.

        Args:
            params: this device's stored shards, float32.
            batch: this device's sequences, int32 [n, S].
        """
        totals = self.totals(batch)
        loss, metrics = self.share_of_loss(params, batch, totals)
        return loss, {**metrics, **totals.metrics}

    def totals(self, batch: Batch) -> Totals:
        """Counts the global batch, of which `batch` has this device's sequences."""
        return count_totals(batch, self.model, self.resolved)

    def share_of_loss(self, params: Params, batch: Batch, totals: Totals) -> tuple[jax.Array, LossMetrics]:
        """Returns this batch's share of the loss over a batch with these `totals`, see `moejax.model.loss`.

        In float16 its gradient is scaled on the way, see `moejax.nn.loss_scale`.
        """
        self._check_shape(batch["tokens"])
        scale = loss_scale(self.model.dtype, totals.num_tokens)
        params = jax.tree.map(lambda w: scale_gradient(w, 1 / scale), params)
        if REPLICA in self.layout.mesh.batch_axes:
            with jax.named_scope("gather"):  # sums gradients over replicas once, while they are sharded
                params = jax.tree.map(lambda w: vary(w, (REPLICA,)), params)
        loss, metrics = per_device.loss(params, batch, totals, self.model, self.resolved, self.table, self.balance)
        return scale_gradient(loss, scale), metrics

    def count_assignments(self, params: Params, slices: Batch) -> jax.Array:
        """Counts the assignments to each expert of this stage's layers, [R, l, E], over all slices [A, n, S].

        This is a forward pass: the load-balance loss of a slice needs the counts of all.
        """

        def count(slice_: Batch) -> jax.Array:
            with jax.named_scope(FORWARD_ONLY):
                return self._hidden(params, slice_["tokens"], slice_["segment_ids"])[1].count_E

        return lax.map(count, slices).sum(0)

    def logits(self, params: Params, tokens_nS: jax.Array, segment_ids_nS: jax.Array) -> jax.Array:
        """Logits of the token after every position of this device's sequences: its columns, float32 [n, S, v].

        Over the mesh they lie as `logits_spec` says. Columns that pad the vocabulary are -inf.
        """
        h_nSD = self._whole_hidden(params, tokens_nS, segment_ids_nS)
        return logits(h_nSD, self._output_weights(params), self.model.vocab_size)

    def next_token_logits(self, params: Params, tokens_nS: jax.Array, position: jax.Array) -> jax.Array:
        """Logits of the token after `position` in each of this device's sequences: its columns [n, v]."""
        h_nSD = self._whole_hidden(params, tokens_nS, jnp.ones_like(tokens_nS))
        h_nD = lax.dynamic_index_in_dim(h_nSD, position, axis=1, keepdims=False)
        return logits(h_nD, self._output_weights(params), self.model.vocab_size)

    def _hidden(self, params: Params, tokens_nS: jax.Array, segment_ids_nS: jax.Array) -> tuple[jax.Array, Any]:
        self._check_shape(tokens_nS)
        return per_device.hidden(params, tokens_nS, segment_ids_nS, self.model, self.resolved, self.table)

    def _check_shape(self, tokens_nS: jax.Array) -> None:
        want = (self.layout.sequences_per_slice, self.layout.seq_len)
        check(
            tokens_nS.shape == want,
            f"tokens_nS has shape {tokens_nS.shape} on each device, and the layout's is {want}; use program.for_batch",
        )

    def _whole_hidden(self, params: Params, tokens_nS: jax.Array, segment_ids_nS: jax.Array) -> jax.Array:
        """Final hidden states of every position, gathered over `tensor`: [n, S, D]."""
        h_MbsD, _ = self._hidden(params, tokens_nS, segment_ids_nS)
        with jax.named_scope("logits"):
            return all_gather(h_MbsD, TENSOR, dim=2).reshape(*tokens_nS.shape, -1)

    def _output_weights(self, params: Params) -> jax.Array:
        return per_device.output_weights(params, self.model, self.table)
