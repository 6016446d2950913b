"""The train step and the evaluation step: the per-device program compiled over the mesh.

Dimensions: A gradient-accumulation slices, B sequences, S sequence, L mixture-of-experts layers, E experts.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.balance import BalanceState
from moejax.balance.balancer import every_layer
from moejax.batch import BATCH_ARRAYS, Batch, check_batch
from moejax.config import OptimizerConfig
from moejax.metrics import EvalMetrics, StepMetrics, summarize
from moejax.model import Params
from moejax.program import Program
from moejax.sharding import make_params, run_once
from moejax.train.optimizer import clip_by_global_norm, learning_rate_schedule, make_optimizer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a step changes. Parameters and moments are stored sharded, the rest is the same on every device."""

    step: jax.Array  # int32, optimizer steps done
    params: Params  # float32
    opt_state: optax.OptState  # the optimizer's moments
    balance: BalanceState


class TrainStep:
    """`state, metrics = train_step(state, batch)` over the program's mesh; `train_step.init(key)` makes the state.

    A batch is {"tokens", "targets", "segment_ids"}: int32 [B, S], of the whole mesh. Targets of -100 are left out of
    the loss. The old state's memory is reused for the new one. `metrics` are `moejax.metrics.StepMetrics`. Where the
    balancer wants buffers of another size next, `with_capacity` makes the step that has them, for the same state.
    """

    def __init__(self, program: Program, optimizer: OptimizerConfig, steps: int) -> None:
        self.program, self.config, self.steps = program, optimizer, steps
        self.schedule = learning_rate_schedule(optimizer, steps)
        self.optimizer = make_optimizer(optimizer, steps, program.table)
        options = program.xla_options
        self._step = jax.jit(self._global_step, donate_argnums=0, compiler_options=options)
        self._evaluate = jax.jit(self._global_evaluate, compiler_options=options)

    def with_capacity(self, factor: float) -> TrainStep:
        """The same step with buffers of another size."""
        return self.with_layout(capacity_factor=factor)

    def with_layout(self, **fields: Any) -> TrainStep:
        """The step with other fields of its layout (`Layout.replace`), on the same devices."""
        return TrainStep(self.program.with_layout(**fields), self.config, self.steps)

    @functools.cached_property
    def state_specs(self) -> TrainState:
        """The state's PartitionSpecs: moments lie as their parameters do."""
        specs = self.program.param_specs
        shapes = jax.tree.map(lambda _: jax.ShapeDtypeStruct((), jnp.float32), specs, is_leaf=_is_spec)
        moments = jax.eval_shape(self.optimizer.init, shapes)
        opt_specs = optax.tree.map_params(
            self.optimizer, lambda _, spec: spec, moments, specs, transform_non_params=lambda _: P(), is_leaf=_is_spec
        )
        balance_specs = jax.tree.map(lambda _: P(), jax.eval_shape(self.program.balancer.init))
        return TrainState(P(), specs, opt_specs, balance_specs)  # type: ignore[arg-type]  # specs in place of arrays

    @functools.cached_property
    def state_shardings(self) -> TrainState:
        to_sharding = functools.partial(NamedSharding, self.program.mesh)
        return jax.tree.map(to_sharding, self.state_specs, is_leaf=_is_spec)

    @functools.cached_property
    def state_shapes(self) -> TrainState:
        """The state as `jax.ShapeDtypeStruct`s with shardings: to compile for, or to restore onto."""
        shapes = jax.eval_shape(self._init, jax.eval_shape(jax.random.key, 0))
        return jax.tree.map(
            lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding), shapes, self.state_shardings
        )

    def init(self, key: jax.Array) -> TrainState:
        """A fresh state, made where it is stored; the same key gives the same one on every mesh."""
        return run_once(self._init, self.state_shardings, key)

    def init_from(self, params: Params) -> TrainState:
        """A state that begins with these parameters, which it takes over, as the program stores them."""
        return run_once(self._init_from, self.state_shardings, params)

    def _init(self, key: jax.Array) -> TrainState:
        return self._init_from(make_params(self.program.table, key))

    def _init_from(self, params: Params) -> TrainState:
        return TrainState(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), self.program.balancer.init())

    def put_batch(self, batch: Any) -> Batch:
        """Places a host's batch on the mesh.

        Raises:
          ConfigError: it lacks an array, or a token is not in the vocabulary, or a target neither in it nor -100.
        """
        check_batch(batch, self.program.model.vocab_size)
        sharding = NamedSharding(self.program.mesh, self.program.batch_spec)
        return jax.device_put({name: batch[name] for name in BATCH_ARRAYS}, sharding)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        return self._step(state, batch)

    def lower(self) -> Any:
        """The step lowered without any array: `.compile()` gives memory and the compiled text."""
        return self._step.lower(self.state_shapes, self.program.batch_shapes)

    def trace(self) -> Any:
        """The step's jaxpr, traced without any array; on an abstract mesh without any device either."""
        return self._step.trace(self.state_shapes, self.program.batch_shapes).jaxpr

    def evaluate(self, params: Params, batch: Batch) -> EvalMetrics:
        """The metrics of a batch, without a gradient and without drops: the same on every mesh, to rounding."""
        return self._evaluate(params, batch)

    def _global_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        program = self.program
        names = ("grad_norm", "learning_rate", "balance", "capacity_factor", "next_capacity_index")
        metric_specs = program.metric_specs | dict.fromkeys(names, P())
        step = program.sharded(
            self._device_step, (self.state_specs, program.batch_spec), (self.state_specs, metric_specs)
        )
        state, metrics = step(state, batch)
        summary = summarize(metrics, batch, program.model.num_moe_layers)
        return state, cast(StepMetrics, {**summary, **metrics["balance"].scalars()})

    def _global_evaluate(self, params: Params, batch: Batch) -> EvalMetrics:
        program = self.program.without_drops().for_batch(*batch["tokens"].shape)
        evaluate = program.sharded(
            lambda params, batch: program.loss(params, batch)[1],
            (program.param_specs, program.batch_spec),
            program.metric_specs,
        )
        return summarize(evaluate(params, batch), batch, program.model.num_moe_layers)

    def _device_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        grads, metrics = self._gradients(state.params, batch)
        # optax raises floats to integer counts, so strict promotion is suspended
        with jax.named_scope("optimizer"), jax.numpy_dtype_promotion("standard"):
            grads, grad_norm = clip_by_global_norm(grads, self.config.clip_norm)
            updates, opt_state = self.optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            metrics |= {"grad_norm": grad_norm, "learning_rate": self.schedule(state.step)}
        balancer, router = self.program.balancer, metrics["router"]
        with jax.named_scope("route"):
            params = self._move_bias(params, router.count_E)
            balance = balancer.update(state.balance, every_layer(router, self.program.model.num_moe_layers))
        metrics |= {
            "balance": balancer.report(balance),
            "capacity_factor": jnp.float32(self.program.layout.dispatch.capacity_factor),
            "next_capacity_index": balancer.wanted_index(balance),
        }
        return TrainState(state.step + 1, params, opt_state, balance), metrics

    def _move_bias(self, params: Any, count_E: jax.Array) -> Any:
        """Returns the parameters with this stage's selection biases moved; they lie as the counts do, [R, 1, l, E]."""
        if not self.program.balance.bias_update_rate:
            return params
        layers = params["layers"]
        bias_E = self.program.balancer.move_bias(layers["moe"]["router_bias_E"], count_E)
        return params | {"layers": layers | {"moe": layers["moe"] | {"router_bias_E": bias_E}}}

    def _gradients(self, params: Params, batch: Batch) -> tuple[Params, dict[str, Any]]:
        """Returns the gradients and metrics of the batch: the shares of its accumulation slices, added up."""
        totals = self.program.totals(batch)
        value_and_grad = jax.value_and_grad(self.program.share_of_loss, has_aux=True)
        num_slices = self.program.layout.grad_accumulation_steps
        if num_slices == 1:
            (_, metrics), grads = value_and_grad(params, batch, totals)
            return grads, metrics | totals.metrics
        slices = jax.tree.map(lambda x_BS: x_BS.reshape(num_slices, -1, x_BS.shape[-1]), batch)
        if self.program.balance.aux_loss_weight:
            totals = totals._replace(count_RlE=self.program.count_assignments(params, slices))

        def add(total: Any, slice_: Batch) -> tuple[Any, None]:
            (_, metrics), grads = value_and_grad(params, slice_, totals)
            return jax.tree.map(jnp.add, total, (grads, metrics)), None

        # The first slice starts the sums, so that they have its types on the mesh.
        first = jax.tree.map(lambda x_ABS: x_ABS[0], slices)
        rest = jax.tree.map(lambda x_ABS: x_ABS[1:], slices)
        (_, metrics), grads = value_and_grad(params, first, totals)
        (grads, metrics), _ = lax.scan(add, (grads, metrics), rest)
        return grads, metrics | totals.metrics


def _is_spec(x: object) -> bool:
    return isinstance(x, P)


def make_train_step(program: Program, optimizer: OptimizerConfig | None = None, *, steps: int = 1000) -> TrainStep:
    """The compiled train step of a program.

    Args:
        program: the model on its mesh.
        optimizer: AdamW's settings.
        steps: length of the learning-rate schedule.
    """
    return TrainStep(program, optimizer or OptimizerConfig(), steps)
