"""Flax NNX modules: the mixture-of-experts layer for a model of your own, and the whole model.

They hold parameters and hand them to the same per-device functions that training runs; they compute nothing themselves.

Dimensions: B batch, S sequence, D model, E experts, V vocabulary; lower case, one device's part of it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax import balance, sharding
from moejax.batch import Batch, check_batch
from moejax.checks import check
from moejax.config import BalanceConfig, DispatchConfig, ModelConfig
from moejax.dispatch import Exchange
from moejax.kernels.manual import varying
from moejax.layout import check_divides, check_experts, check_hops
from moejax.mesh import EXPERT, TENSOR, count_hosts
from moejax.metrics import EvalMetrics, summarize
from moejax.moe import mixture_of_experts
from moejax.nn.embedding import check_ids
from moejax.program import Program


class MoEStats(NamedTuple):
    """One layer's figures over every token of the global batch, float32; the same on every device."""

    aux_loss: jax.Array  # load balance (Switch, arXiv 2101.03961, eq. 4), 1 when balanced; not weighted
    z_loss: jax.Array  # mean squared log-sum-exp of the router's logits (ST-MoE, 2202.08906, eq. 5); not weighted
    load_E: jax.Array  # assignments to each expert, dropped ones too; no gradient
    dropped_fraction: jax.Array  # of all assignments; no gradient
    rounds: jax.Array  # that the dispatch took, mean over devices; no gradient


class SelectionBias(nnx.Variable[jax.Array]):
    """The bias of a router's choice of experts. It gets no gradient: the loads move it, and optimizers pass it over."""


class MoELayer(nnx.Module):
    """A mixture-of-experts feed-forward to put into an NNX model: `y_BSD, stats = layer(x_BSD)`.

    Parameters are float32, made where they are stored: `w_router_DE`, `experts.w_in_EDGF`, `experts.w_out_EFD` and,
    with `config.shared_d_ff`, `shared.w_in_DGF`, `shared.w_out_FD` and perhaps `shared.w_gate_D`
    (`moejax.sharding.moe_params` is their table).
    With `config.router.bias` there is also `router_bias_E`, a `SelectionBias`, at first 0: call `update_bias` with the
    loads of each step to move it.
    The residual connection and the norm are yours, and so are the weights of the two losses (`BalanceConfig` has the
    usual ones). With `dtype="float16"` so is the scale of the loss, without which small gradients underflow. Calling
    the layer mutates nothing.

    It may be called in two places:

    - On global arrays, eagerly or under `jax.jit` or `nnx.jit`. B is split over `replica` and `expert`, S over
      `tensor`, and must be multiples of them. If the mesh's axes are Explicit, x must already lie by `layer.x_spec`.
    - Inside a `shard_map` of yours with `check_vma=True` over a mesh with the same axes, on this device's tokens
      [b, s, D]. Pass the layer's state with `in_specs=layer.specs()`; `layer.x_spec` is how the first form splits x.
      Statistics are summed over the axes of `x_spec` and no others: tokens that also differ over `pipeline` give
      statistics that do.

    With `dispatch.strategy="capacity"`, what is dropped depends on which tokens meet, so on the mesh; the other
    strategies drop nothing and give the same on all.
    """

    w_router_DE: nnx.Param[jax.Array]
    experts: nnx.Dict[Any]

    def __init__(
        self, config: ModelConfig, mesh: Mesh, dispatch: DispatchConfig | None = None, *, rngs: nnx.Rngs
    ) -> None:
        """Draws the parameters from `rngs.params()`; the same key gives the same ones on every mesh.

        Args:
            config: `d_model`, `d_ff`, `num_experts`, `experts_per_token`, `router`, `shared_d_ff`, `shared_gate` and
                `dtype` are used, and `num_layers` to scale the initial output weights as the branches of so deep a
                residual network.
            mesh: has the axes `expert` and `tensor`; `moejax.build_mesh` makes one.
            dispatch: how tokens reach their experts. With `hierarchical`, each process of JAX is a host.
            rngs: the stream `params`, or the default one.

        Raises:
            ConfigError: the layer does not fit on the mesh.
        """
        missing = [axis for axis in (EXPERT, TENSOR) if axis not in mesh.axis_names]
        check(not missing, f"mesh axes {mesh.axis_names} lack {' and '.join(missing)}; make it with moejax.build_mesh")
        self.config, self.mesh, self.dispatch = config, mesh, dispatch or DispatchConfig()
        check_experts(config, self.dispatch, mesh)
        hosts = _exchange_hosts(self.dispatch, mesh)
        check_hops(self.dispatch, hosts, f"mesh={dict(mesh.shape)}")
        check_divides("expert", mesh.shape[EXPERT], "its hosts", hosts)
        table = sharding.moe_params(config, self.dispatch)
        _hold(self, sharding.init_params(table, mesh, rngs.params()))

    @property
    def x_spec(self) -> P:
        """How the input and the output [B, S, D] lie on the mesh."""
        return _x_spec(self.mesh)

    def specs(self) -> nnx.State[Any, Any]:
        """The PartitionSpecs of `nnx.state(layer)`, nested as that is: for the `in_specs` of your `shard_map`."""
        state = jax.tree.map(lambda _: P(), nnx.state(self))
        specs = sharding.param_specs(sharding.moe_params(self.config, self.dispatch))
        nnx.replace_by_pure_dict(state, specs)
        return state

    def __call__(self, x_BSD: jax.Array) -> tuple[jax.Array, MoEStats]:
        """Sends each token to its experts and returns the weighted results, in x's dtype, and the figures.

        The experts compute in `config.dtype`, the router in float32.

        Raises:
            ConfigError: the shape does not fit, or the call is inside a `shard_map` that it cannot run in.
        """
        check(
            x_BSD.ndim == 3 and x_BSD.shape[2] == self.config.d_model,
            f"x_BSD has shape {x_BSD.shape}; it must be [B, S, d_model={self.config.d_model}]",
        )
        params = _plain(self)
        if self._inside_shard_map():
            self._check_local(params)
            return _device_moe(params, x_BSD, config=self.config, mesh=self.mesh, dispatch=self.dispatch)
        self._check_global(x_BSD)
        return _global_moe(self.config, self.mesh, self.dispatch)(params, x_BSD)

    def update_bias(self, load_E: jax.Array, rate: float | None = None) -> None:
        """Moves the selection bias so that busy experts are chosen less (loss-free balancing, arXiv 2408.15664).

        Call it once per step with `stats.load_E`, after the gradients are taken: it mutates the layer.

        Args:
            load_E: assignments to each expert in the step, or a sum of several calls'.
            rate: the step of the bias, as `BalanceConfig.bias_update_rate`. Default: that of `BalanceConfig.suited_to`.

        Raises:
            ConfigError: the layer has no bias.
        """
        check(self.config.router.bias, "router.bias=False leaves update_bias nothing to move; use router.bias=True")
        config = BalanceConfig.suited_to(self.config)
        if rate is not None:
            config = dataclasses.replace(config, bias_update_rate=rate)
        balancer = balance.ExpertLoadBalancer(self.config, config)
        bias: SelectionBias = vars(self)["router_bias_E"]  # `_hold` has set it
        bias.set_value(balancer.move_bias(bias.get_value(), load_E))

    def _inside_shard_map(self) -> bool:
        context = jax.sharding.get_abstract_mesh()
        if not context.manual_axes:
            return False
        needed = _token_axes(self.mesh)
        missing = [axis for axis in needed if axis not in context.manual_axes]
        check(
            not missing,
            f"MoELayer is called inside a shard_map over {tuple(context.manual_axes)}, which lacks {tuple(missing)}; "
            f"let it be over {needed} and any others, or call the layer outside it on global arrays",
        )
        sizes, own = ({axis: mesh.shape[axis] for axis in needed} for mesh in (context, self.mesh))
        check(sizes == own, f"MoELayer is called inside a shard_map over a mesh of {sizes}; the layer's mesh has {own}")
        return True

    def _check_local(self, params: Any) -> None:
        """Without these, a gathered router or a gradient without its sum over devices would go on unnoticed."""
        table = sharding.moe_params(self.config, self.dispatch)
        for path, p in _paths(table):
            w = functools.reduce(lambda tree, key: tree[key], path, params)
            expected = NamedSharding(self.mesh, p.spec).shard_shape(p.shape)
            axes = {axis for axes in p.stored for axis in axes}
            check(
                w.shape == expected and axes <= varying(w),
                f"{'.'.join(path)} has shape {w.shape} and must be this device's part {expected} by {p.spec}: pass the "
                f"layer's state to the shard_map with in_specs=layer.specs(), and check_vma=True",
            )

    def _check_global(self, x_BSD: jax.Array) -> None:
        batch_size, seq_len, _ = x_BSD.shape
        for name, size, axes in (("B", batch_size, sharding.batch_axes(self.mesh)), ("S", seq_len, (TENSOR,))):
            unit = math.prod(self.mesh.shape[axis] for axis in axes)
            check(
                size % unit == 0,
                f"x_BSD has {name}={size}, which must be a multiple of {' × '.join(axes)} = {unit}; "
                f"try {max(unit, size // unit * unit)}",
            )


class Transformer(nnx.Module):
    """The whole model as one NNX module: `logits_BSV = model(tokens_BS)`.

    Parameters are nested as in `program.table`: `model.embed.table_VD`, `model.layers.moe.w_router_DE`, and so on;
    those of the layers are stacked [repeats, stages, layers per chunk, ...].

    It is for looking at, calling and fine-tuning a model by hand. A hot loop passes `model.params`, the plain pytree
    that `Program` and `make_train_step` take, and `Transformer.from_params(program, state.params)` brings the trained
    ones back. `jax.jit` flattens its arguments in every call, which for a module is Python code by the variable: 7 ms
    of host time for 800 of them, and 111 ms under `nnx.jit`, against 0.7 ms for dicts.
    """

    def __init__(self, program: Program, *, rngs: nnx.Rngs) -> None:
        """Holds `program.init(rngs.params())`; the same key gives the same model on every mesh."""
        self.program = program
        _hold(self, program.init(rngs.params()))

    @classmethod
    def from_params(cls, program: Program, params: dict[str, Any]) -> Transformer:
        """The model with these parameters, which are not copied.

        Raises:
            ConfigError: they are not this program's.
        """
        model = nnx.eval_shape(lambda: cls(program, rngs=nnx.Rngs(0)))
        model.update(params)
        return model

    @property
    def params(self) -> dict[str, Any]:
        """The parameters as nested dicts of arrays. They share memory with the model's."""
        return _plain(self)

    def update(self, params: dict[str, Any]) -> None:
        """Puts other parameters in the place of these, in the same variables.

        Raises:
            ConfigError: they are not this program's.
        """
        expected = {path: p.shape for path, p in _paths(self.program.table)}
        given = {path: jnp.shape(w) for path, w in _paths(params)}
        for path in sorted(expected.keys() | given.keys()):
            have, want = (shapes.get(path, "none") for shapes in (given, expected))
            check(have == want, f"params: {'.'.join(path)} has shape {have}; this program's has {want}")
        nnx.update(self, params)

    def __call__(self, tokens_BS: jax.Array, segment_ids_BS: jax.Array | None = None) -> jax.Array:
        """Logits of the token after each: float32 [B, S, V], split over the mesh by `program.logits_spec`.

        Args:
            tokens_BS: int32, on the whole mesh.
            segment_ids_BS: int32; a token attends to earlier ones with its own id. Default: one segment a sequence.

        A token that is not in the vocabulary is refused. Where `jax.jit` hides its value, the logits of its sequence
        are NaN.

        Raises:
            ConfigError: B or S does not fit on the mesh, or a token is not in the vocabulary.
        """
        program = self._program_for(tokens_BS)
        check_ids("tokens_BS", tokens_BS, program.model.vocab_size)
        segment_ids_BS = jnp.ones_like(tokens_BS) if segment_ids_BS is None else segment_ids_BS
        return _global_logits(program)(self.params, tokens_BS, segment_ids_BS)[..., : program.model.vocab_size]

    def loss(self, batch: Batch) -> tuple[jax.Array, EvalMetrics]:
        """Returns the loss of {"tokens", "targets", "segment_ids"}, int32 [B, S], and the metrics of
        `TrainStep.evaluate`. Targets of -100 are left out.

        Raises:
            ConfigError: B or S does not fit on the mesh, or an id is out of range. Where `jax.jit` hides its value,
                the loss is NaN and the metric `out_of_range_ids` counts it.
        """
        check_batch(batch, self.program.model.vocab_size)
        program = self._program_for(batch["tokens"])
        loss, metrics = _global_loss(program)(self.params, batch)
        return loss, summarize(metrics, batch, program.model.num_moe_layers)

    def _program_for(self, tokens_BS: jax.Array) -> Program:
        manual = jax.sharding.get_abstract_mesh().manual_axes
        check(
            not manual,
            f"Transformer is called inside a shard_map over {tuple(manual)} and opens one of its own; there, "
            "use Program.logits or Program.loss",
        )
        check(tokens_BS.ndim == 2, f"tokens_BS has shape {tokens_BS.shape}; it must be [B, S]")
        return self.program.for_batch(*tokens_BS.shape)


def _hold(module: nnx.Module, params: dict[str, Any]) -> None:
    """Makes every array of nested dicts a variable of the module, under the same names."""

    def variables(name: str, tree: Any) -> Any:
        if isinstance(tree, dict):
            return nnx.Dict({name: variables(name, subtree) for name, subtree in tree.items()})
        return SelectionBias(tree) if name == "router_bias_E" else nnx.Param(tree)

    for name, subtree in params.items():
        setattr(module, name, variables(name, subtree))


def _plain(module: nnx.Module) -> dict[str, Any]:
    """What `_hold` was given."""
    return nnx.to_pure_dict(nnx.state(module, (nnx.Param, SelectionBias)))


def _paths(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """The leaves of nested dicts with the names that lead to them."""
    if not isinstance(tree, dict):
        return [(path, tree)]
    return [leaf for name, subtree in tree.items() for leaf in _paths(subtree, (*path, name))]


def _token_axes(mesh: Mesh) -> tuple[str, ...]:
    """The axes that split a layer's tokens."""
    return (*sharding.batch_axes(mesh), TENSOR)


def _x_spec(mesh: Mesh) -> P:
    return P(sharding.batch_axes(mesh), TENSOR)


def _exchange_hosts(dispatch: DispatchConfig, mesh: Mesh) -> int:
    """Hosts that tokens are exchanged between in a hop of its own; 1 where one hop takes them anywhere."""
    return count_hosts(mesh, EXPERT) if dispatch.hierarchical else 1


def _device_moe(
    params: dict[str, Any], x_bsD: jax.Array, *, config: ModelConfig, mesh: Mesh, dispatch: DispatchConfig
) -> tuple[jax.Array, MoEStats]:
    """The layer on one device's tokens and stored shards."""
    p = sharding.gather(params, sharding.moe_params(config, dispatch))
    exchange = Exchange.make(dispatch, config, math.prod(x_bsD.shape[:2]), _exchange_hosts(dispatch, mesh))
    y_bsD, sums, _ = mixture_of_experts(p, x_bsD.astype(config.dtype), config, exchange)
    token_axes = _token_axes(mesh)
    with jax.named_scope("route"):
        sums = lax.psum(sums, token_axes)
    num_tokens = math.prod(x_bsD.shape[:2]) * math.prod(mesh.shape[axis] for axis in token_axes)
    count_E, dropped, rounds, dispatches = lax.stop_gradient((sums.count_E, sums.dropped, sums.rounds, sums.dispatches))
    stats = MoEStats(
        balance.load_balance_loss(sums, num_tokens),
        balance.router_z_loss(sums, num_tokens),
        count_E,
        dropped / count_E.sum(),
        rounds / dispatches,
    )
    return y_bsD.astype(x_bsD.dtype), stats


# Modules are made anew by every `nnx.merge`, so what they compile is kept by what it depends on.


@functools.lru_cache(maxsize=64)
def _global_moe(config: ModelConfig, mesh: Mesh, dispatch: DispatchConfig) -> Any:
    """(parameters, x [B, S, D]) -> (y [B, S, D], MoEStats), on global arrays."""
    device_moe = functools.partial(_device_moe, config=config, mesh=mesh, dispatch=dispatch)
    in_specs = (sharding.param_specs(sharding.moe_params(config, dispatch)), _x_spec(mesh))
    out_specs = (_x_spec(mesh), P())
    return jax.jit(jax.shard_map(device_moe, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=True))


@functools.lru_cache(maxsize=64)
def _global_logits(program: Program) -> Any:
    in_specs = (program.param_specs, program.batch_spec, program.batch_spec)
    return jax.jit(program.sharded(program.logits, in_specs, program.logits_spec))


@functools.lru_cache(maxsize=64)
def _global_loss(program: Program) -> Any:
    in_specs = (program.param_specs, program.batch_spec)
    return jax.jit(program.sharded(program.loss, in_specs, (P(), program.metric_specs)))
