"""The one table of parameters: shape, initializer, where it is stored, what is gathered before use.

Every parameter is stored fully sharded. Dense parameters are spread over `expert` (the data-parallel axis of every
dense part) along one of their dimensions and gathered along it before use, once a step or layer by layer; experts are
spread over `expert_axes` and used where they lie. An `all_gather` transposes to a `psum_scatter`, so gradients arrive
sharded the same way: that one line is ZeRO and FSDP.

Dimensions: D model, N query heads, K key/value heads, H head, E experts, G=2 (gate, up or key, value), F feed-forward,
V vocabulary. The layers of the pipeline are stacked in front as [repeats, stages, layers per chunk]; in row-major order
that is the logical order of the layers, so a checkpoint of one mesh reads on any other.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.compiler import ONCE, for_jit
from moejax.config import ConfigError, DispatchConfig, ModelConfig, ParallelConfig, check
from moejax.mesh import EXPERT, PIPELINE, REPLICA, TENSOR, MeshConfig, platform

VOCAB_AXES = (PIPELINE, TENSOR)
EMBEDDING_STD = 0.02
NUM_STACK_DIMS = 3  # [repeats, stages, layers per chunk] in front of a parameter of the pipeline

Axes = tuple[str, ...]


class AxisSizes(Protocol):
    """A mesh, or the configuration of one."""

    @property
    def shape(self) -> Mapping[str, int]: ...


def batch_axes(mesh: Mesh | AbstractMesh) -> Axes:
    """The axes that split the batch."""
    return tuple(axis for axis in (REPLICA, EXPERT) if axis in mesh.axis_names)


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: global shape, initial standard deviation, stored axes per dim, what to gather.

    `std` None means ones, 0 zeros. `gather` is the dim to gather before use and the mesh axes to gather it over, or
    None for what is used as stored.
    """

    shape: tuple[int, ...]
    std: float | None
    stored: tuple[Axes, ...]
    gather: tuple[int, Axes] | None = None
    num_stack_dims: int = 0

    @property
    def spec(self) -> P:
        return P(*(axes or None for axes in self.stored))

    def stacked(self, sizes: tuple[int, ...], stored: tuple[Axes, ...]) -> Param:
        gather = self.gather and (self.gather[0] + len(sizes), self.gather[1])
        return Param(sizes + self.shape, self.std, stored + self.stored, gather, len(sizes))

    def init(self, key: jax.Array) -> jax.Array:
        """float32 values that depend on the logical shape only, not on how the layers are stacked."""
        if self.std is None:
            return jnp.ones(self.shape, jnp.float32)
        num_layers = math.prod(self.shape[: self.num_stack_dims])
        logical = (num_layers, *self.shape[self.num_stack_dims :])
        return (self.std * jax.random.normal(key, logical)).reshape(self.shape)


def _dense(shape: tuple[int, ...], fan_in: int | None, gather_dim: int, over: Axes, **split: Axes) -> Param:
    """A parameter stored over the axes `over` along `gather_dim`, and over `split["dim1"]` … along other dims."""
    stored = [split.get(f"dim{i}", ()) for i in range(len(shape))]
    stored[gather_dim] = over
    std = None if fan_in is None else fan_in**-0.5
    return Param(shape, std, tuple(stored), (gather_dim, over))


def _attention(m: ModelConfig, over: Axes) -> dict[str, Param]:
    heads: Axes = (TENSOR,)
    return {
        "norm_D": _dense((m.d_model,), None, 0, over),
        "w_q_DNH": _dense((m.d_model, m.num_heads, m.head_dim), m.d_model, 0, over, dim1=heads),
        "w_kv_DGKH": _dense((m.d_model, 2, m.num_kv_heads, m.head_dim), m.d_model, 0, over, dim2=heads),
        "w_o_NHD": _dense(
            (m.num_heads, m.head_dim, m.d_model),
            2 * m.num_layers * m.num_heads * m.head_dim,  # residual branches start small (GPT-2)
            2,
            over,
            dim0=heads,
        ),
    }


def _feed_forward(m: ModelConfig, d_ff: int, over: Axes) -> dict[str, Param]:
    """A SwiGLU that every token visits. Tokens are already split over `tensor`, so its weights are gathered whole."""
    return {
        "w_in_DGF": _dense((m.d_model, 2, d_ff), m.d_model, 0, over),
        "w_out_FD": _dense((d_ff, m.d_model), 2 * m.num_layers * d_ff, 1, over),
    }


def _experts(m: ModelConfig, expert_axes: Axes) -> dict[str, Param]:
    width: Axes = () if TENSOR in expert_axes else (TENSOR,)
    down_std = (2 * m.num_layers * m.d_ff) ** -0.5
    return {
        "w_in_EDGF": Param((m.num_experts, m.d_model, 2, m.d_ff), m.d_model**-0.5, (expert_axes, (), (), width)),
        "w_out_EFD": Param((m.num_experts, m.d_ff, m.d_model), down_std, (expert_axes, width, ())),
    }


def moe_params(m: ModelConfig, dispatch: DispatchConfig) -> dict[str, Any]:
    """The parameters of one mixture-of-experts feed-forward, not stacked."""
    table: dict[str, Any] = {
        "w_router_DE": _dense((m.d_model, m.num_experts), m.d_model, 0, (EXPERT,)),
        "experts": _experts(m, dispatch.expert_axes),
    }
    if m.router_bias:
        table["router_bias_E"] = Param((m.num_experts,), 0.0, ((),))
    if m.shared_d_ff:
        table["shared"] = _feed_forward(m, m.shared_d_ff, (EXPERT, TENSOR))
    return table


def param_table(m: ModelConfig, dispatch: DispatchConfig, parallel: ParallelConfig, mesh: AxisSizes) -> dict[str, Any]:
    """Every parameter of the model, nested as the model uses them: path -> `Param`."""
    stages = mesh.shape[PIPELINE]
    chunk = m.num_moe_layers // (parallel.repeats * stages)
    layer = {
        "attention": _attention(m, (EXPERT,)),
        "moe_norm_D": _dense((m.d_model,), None, 0, (EXPERT,)),
        "moe": moe_params(m, dispatch),
    }
    table: dict[str, Any] = {
        "embed": {"table_VD": Param((m.vocab_size, m.d_model), EMBEDDING_STD, (VOCAB_AXES, (EXPERT,)), (1, (EXPERT,)))},
        "layers": _map(lambda p: p.stacked((parallel.repeats, stages, chunk), ((), (PIPELINE,), ())), layer),
        "head": {"norm_D": _dense((m.d_model,), None, 0, (EXPERT,))},
    }
    if not m.tie_embeddings:
        table["head"]["w_DV"] = _dense((m.d_model, m.vocab_size), m.d_model, 0, (EXPERT,), dim1=VOCAB_AXES)
    if m.num_dense_layers:
        # They run before the pipeline, data-parallel over its axis, so that no stage carries them alone.
        dense = {
            "attention": _attention(m, (EXPERT, PIPELINE)),
            "feed_forward_norm_D": _dense((m.d_model,), None, 0, (EXPERT, PIPELINE)),
            "feed_forward": _feed_forward(m, m.dense_d_ff, (EXPERT, PIPELINE, TENSOR)),
        }
        table["dense_layers"] = _map(lambda p: p.stacked((m.num_dense_layers,), ((),)), dense)
    return table


def _is_param(x: object) -> bool:
    return isinstance(x, Param)


def _map(f: Callable[..., Any], table: Any, *rest: Any) -> Any:
    return jax.tree.map(f, table, *rest, is_leaf=_is_param)


def param_specs(table: Any) -> Any:
    """The table's PartitionSpecs, in the same nesting."""
    return _map(lambda p: p.spec, table)


def param_shapes(table: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The table as float32 `jax.ShapeDtypeStruct`s with their shardings: what checkpoints and compilers ask for."""
    return _map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=NamedSharding(mesh, p.spec)), table)


def make_params(table: Any, key: jax.Array) -> Any:
    """Float32 parameters as the table says. The same key gives the same values on every mesh."""
    leaves, treedef = jax.tree.flatten(table, is_leaf=_is_param)
    return jax.tree.unflatten(treedef, [p.init(jax.random.fold_in(key, i)) for i, p in enumerate(leaves)])


def init_params(table: Any, mesh: Mesh | AbstractMesh, key: jax.Array) -> Any:
    """`make_params`, made where they are stored."""
    return run_once(lambda key: make_params(table, key), _map(lambda p: NamedSharding(mesh, p.spec), table), key)


def run_once(function: Callable[..., Any], shardings: Any, *args: Any) -> Any:
    """`jax.jit(function, out_shardings=shardings)(*args)`, compiled without optimization: five times sooner done.

    See `moejax.compiler.ONCE`. Inside another `jit`, that one's compilation decides.
    """
    traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args))
    options = None if traced else for_jit(ONCE)
    return jax.jit(function, out_shardings=shardings, compiler_options=options)(*args)


def gather(params: Any, table: Any, unstacked: bool = False) -> Any:
    """All-gathers each parameter of a subtree along its gather dim. Per-device; transposes to a reduce-scatter.

    `unstacked` says that the arrays have lost the leading stack dims that the table still counts.
    """

    def one(p: Param, w: jax.Array) -> jax.Array:
        if p.gather is None:
            return w
        dim, axes = p.gather
        return lax.all_gather(w, axes, axis=dim - (p.num_stack_dims if unstacked else 0), tiled=True)

    with jax.named_scope("gather"):
        return _map(one, table, params)


def _check_divides(name: str, value: int, axes: str, size: int) -> None:
    """Raises `ConfigError` unless `size`, the product of `axes`, divides `value`; says which of either would do."""
    if value % size == 0:
        return
    *more, largest = (str(d) for d in range(1, min(size, 2**16)) if value % d == 0)
    divisors = f"{', '.join(more)} or {largest}" if more else largest
    nearest = math.ceil(value / size) * size
    raise ConfigError(
        f"{name}={value} must be a multiple of {axes} = {size}; try {name}={nearest}, or {axes} = {divisors}"
    )


def _hosts_along_experts(mesh: Mesh | AbstractMesh | MeshConfig) -> int | None:
    """Returns how many hosts, or else processes, the expert axis crosses; None where they are unknown or virtual."""
    if isinstance(mesh, MeshConfig):
        return None if mesh.platform == "cpu" else mesh.hosts_along(EXPERT)
    if isinstance(mesh, AbstractMesh) or platform(mesh) == "cpu":
        return None
    along = np.moveaxis(mesh.devices, mesh.axis_names.index(EXPERT), 0).reshape(mesh.shape[EXPERT], -1)[:, 0]
    return len({device.process_index for device in along})


def check_moe_layout(m: ModelConfig, dispatch: DispatchConfig, mesh: Mesh | AbstractMesh | MeshConfig) -> None:
    """Raises `ConfigError` where one mixture-of-experts feed-forward, `moe_params`, does not fit on the mesh."""
    expert, tensor = mesh.shape[EXPERT], mesh.shape[TENSOR]
    experts_over = math.prod(mesh.shape[a] for a in dispatch.expert_axes)
    _check_divides("num_experts", m.num_experts, " × ".join(dispatch.expert_axes), experts_over)
    _check_divides("d_model", m.d_model, "expert", expert)
    check(
        expert % dispatch.hosts == 0,
        f"dispatch.hosts={dispatch.hosts} must divide the expert axis {expert}, the one that crosses hosts",
    )
    crossed = _hosts_along_experts(mesh)
    check(
        crossed is None or crossed % dispatch.hosts == 0,
        f"dispatch.hosts={dispatch.hosts} must divide {crossed}, the hosts that the mesh's expert axis crosses",
    )
    if TENSOR not in dispatch.expert_axes:
        _check_divides("d_ff", m.d_ff, "tensor", tensor)
    if m.shared_d_ff:
        _check_divides("d_model", m.d_model, "expert × tensor", expert * tensor)


def check_layout(
    m: ModelConfig,
    dispatch: DispatchConfig,
    parallel: ParallelConfig,
    mesh: Mesh | AbstractMesh | MeshConfig,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    accumulate: int = 1,
) -> None:
    """Raises `ConfigError`, naming what would be right, where the model or the batch does not fit on the mesh."""
    expert, stages, tensor = (mesh.shape[a] for a in (EXPERT, PIPELINE, TENSOR))
    check_moe_layout(m, dispatch, mesh)
    _check_divides("num_heads", m.num_heads, "tensor", tensor)
    _check_divides("num_kv_heads", m.num_kv_heads, "tensor", tensor)
    if m.num_dense_layers:
        _check_divides("d_model", m.d_model, "expert × pipeline × tensor", expert * stages * tensor)
    _check_divides("vocab_size", m.vocab_size, "pipeline × tensor", stages * tensor)
    layers = "num_layers" if not m.num_dense_layers else "num_layers - num_dense_layers"
    _check_divides(layers, m.num_moe_layers, "pipeline × repeats", stages * parallel.repeats)
    check(
        parallel.repeats == 1 or parallel.num_microbatches >= stages,
        f"num_microbatches={parallel.num_microbatches} must be at least the pipeline's {stages} stages "
        f"when repeats={parallel.repeats}",
    )
    if seq_len is not None:
        check(seq_len <= m.max_seq_len, f"seq_len={seq_len} must be at most max_seq_len={m.max_seq_len}")
        check(seq_len % tensor == 0, f"seq_len={seq_len} must be a multiple of tensor axis {tensor}")
    if batch_size is not None:
        replicas = mesh.shape.get(REPLICA, 1)
        parts = {"replica": replicas, "expert": expert, "num_microbatches": parallel.num_microbatches}
        parts["batch_split"] = max(1, parallel.batch_split)
        if m.num_dense_layers:
            parts["pipeline (leading dense layers run data-parallel over it)"] = stages
        parts["accumulate"] = accumulate
        unit = math.prod(parts.values())
        product = " × ".join(f"{k} {v}" for k, v in parts.items() if v > 1)
        nearest = max(unit, batch_size // unit * unit)
        check(
            batch_size % unit == 0, f"batch_size={batch_size} must be a multiple of {unit} = {product}; try {nearest}"
        )
