"""The one table of parameters: shape, initializer, where it is stored, what is gathered before use, and how it is used.

Every parameter is stored fully sharded. Dense parameters are spread over `expert` (the data-parallel axis of every
dense part) along one of their dimensions and gathered along it before use, once a step or layer by layer; experts are
spread over `expert_axes` and used where they lie. An `all_gather` transposes to a `psum_scatter`, so gradients arrive
sharded the same way: that one line is ZeRO and FSDP.

Dimensions: D model, N query heads, K key/value heads, H head, E experts, G=2 (gate, up or key, value), F feed-forward,
V vocabulary. Of latent attention: Q latent of queries, C latent of keys and values, J that latent with the part of keys
that heads share behind it; H is the width of a head in the matrix at hand, which differs between them.

The layers of the pipeline are stacked in front as [repeats, stages, layers per chunk]; in row-major order that is the
logical order of the layers, so a checkpoint of one mesh reads on any other. Where their number doesn't divide evenly,
the last places hold zeros.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from moejax.compiler import ONCE, for_jit
from moejax.config import AttentionKind, DispatchConfig, ModelConfig
from moejax.layout import VOCAB_AXES, Layout
from moejax.mesh import EXPERT, PIPELINE, REPLICA, TENSOR

EMBEDDING_STD = 0.02
STACK_DIMS = {"layers": 3, "dense_layers": 1}  # of a group: [repeats, stages, layers per chunk] or [layers], in front
NUM_STACK_DIMS = STACK_DIMS["layers"]

Axes = tuple[str, ...]
ComputeDtype = Literal["model", "float32"]


def batch_axes(mesh: Mesh | AbstractMesh) -> Axes:
    """The axes that split the batch."""
    return tuple(axis for axis in (REPLICA, EXPERT) if axis in mesh.axis_names)


@dataclasses.dataclass(frozen=True)
class Param:
    """One parameter: global shape, initial standard deviation, stored axes per dim, what to gather, and its use.

    `std` None means ones, 0 zeros. `gather` is the dim to gather before use and the mesh axes to gather it over, or
    None for what is used as stored. `decay` says whether weight decay pulls it to 0. `compute_dtype` is the dtype of
    its compute copy, where "model" is `ModelConfig.dtype`, or None for what is used without a copy and a gradient.
    `padding` is the number of zeros at the end of a layer's dims, as pairs for `jnp.pad`, or () for none. Of the places
    that `num_stack_dims` dims in front hold, the first `num_layers` have a layer; the others hold zeros.
    """

    shape: tuple[int, ...]
    std: float | None
    stored: tuple[Axes, ...]
    gather: tuple[int, Axes] | None = None
    num_stack_dims: int = 0
    num_layers: int = 1
    padding: tuple[tuple[int, int], ...] = ()
    decay: bool = dataclasses.field(kw_only=True)
    compute_dtype: ComputeDtype | None = dataclasses.field(kw_only=True)

    @property
    def spec(self) -> P:
        return P(*(axes or None for axes in self.stored))

    def stacked(self, sizes: tuple[int, ...], stored: tuple[Axes, ...], num_layers: int) -> Param:
        gather = self.gather and (self.gather[0] + len(sizes), self.gather[1])
        return dataclasses.replace(
            self, shape=sizes + self.shape, stored=stored + self.stored, gather=gather, num_stack_dims=len(sizes),
            num_layers=num_layers,
        )  # fmt: skip

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the dims that layers are stacked in."""
        return self.shape[: self.num_stack_dims]

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer, without padding."""
        shape = self.shape[self.num_stack_dims :]
        padding = self.padding or ((0, 0),) * len(shape)
        return tuple(size - more for size, (_, more) in zip(shape, padding, strict=True))

    def init(self, key: jax.Array) -> jax.Array:
        """float32 values that depend on the logical shape only, not on how the layers are stacked."""
        places = math.prod(self.stack)
        shape = (places, *self.layer_shape)
        # Empty places are drawn, too, and then zeroed: a longer first dim doesn't change the values before, and one
        # that the mesh divides is drawn in shards.
        values = jnp.ones(shape, jnp.float32) if self.std is None else self.std * jax.random.normal(key, shape)
        if places > self.num_layers:
            filled = jnp.arange(places).reshape(-1, *(1,) * len(self.layer_shape)) < self.num_layers
            values = jnp.where(filled, values, jnp.zeros_like(values))
        return (jnp.pad(values, ((0, 0), *self.padding)) if self.padding else values).reshape(self.shape)


def _dense(
    shape: tuple[int, ...], fan_in: int, gather_dim: int, over: Axes, compute_dtype: ComputeDtype = "model",
    **split: Axes,
) -> Param:  # fmt: skip
    """A matrix stored over the axes `over` along `gather_dim`, and over `split["dim1"]` … along other dims."""
    stored = [split.get(f"dim{i}", ()) for i in range(len(shape))]
    stored[gather_dim] = over
    return Param(shape, fan_in**-0.5, tuple(stored), (gather_dim, over), decay=True, compute_dtype=compute_dtype)


def _norm(size: int, over: Axes) -> Param:
    """The scales of a norm, stored over the axes `over`."""
    return Param((size,), None, (over,), (0, over), decay=False, compute_dtype="float32")


def _attention(m: ModelConfig, over: Axes) -> dict[str, Param]:
    D, N, H = m.d_model, m.attention.num_heads, m.attention.value_dim
    table = {
        "norm_D": _norm(D, over),
        **_HEADS[m.attention.kind](m, over),
        "w_o_NHD": _dense(
            (N, H, D),
            2 * m.num_layers * N * H,  # residual branches start small (GPT-2)
            2,
            over,
            dim0=(TENSOR,),
        ),
    }
    if m.attention.output_bias:
        table["b_o_D"] = Param((D,), 0.0, (over,), (0, over), decay=False, compute_dtype="model")
    return table


def _grouped_heads(m: ModelConfig, over: Axes) -> dict[str, Param]:
    """What makes queries, keys and values of tokens."""
    heads: Axes = (TENSOR,)
    D, N, K, H = m.d_model, m.attention.num_heads, m.attention.num_kv_heads, m.attention.head_dim
    # Vectors of heads are too small to be spread over other devices than their heads are.
    scale = functools.partial(Param, std=None, decay=False, compute_dtype="float32")
    bias = functools.partial(Param, std=0.0, decay=False, compute_dtype="model")
    table = {
        "w_q_DNH": _dense((D, N, H), D, 0, over, dim1=heads),
        "w_kv_DGKH": _dense((D, 2, K, H), D, 0, over, dim2=heads),
    }
    if m.attention.qk_norm == "head":
        table |= {"norm_q_H": scale((H,), stored=((),)), "norm_k_H": scale((H,), stored=((),))}
    if m.attention.qk_norm == "projection":
        table |= {"norm_q_NH": scale((N, H), stored=(heads, ())), "norm_k_KH": scale((K, H), stored=(heads, ()))}
    if m.attention.bias:
        table |= {"b_q_NH": bias((N, H), stored=(heads, ())), "b_kv_GKH": bias((2, K, H), stored=((), heads, ()))}
    return table


def _latent_heads(m: ModelConfig, over: Axes) -> dict[str, Param]:
    """What makes latents of tokens, which no head has a part of, and queries, keys and values of them."""
    heads: Axes = (TENSOR,)
    a, latent = m.attention, m.attention.latent
    D, N, H, Q, C = m.d_model, a.num_heads, a.head_dim, latent.q_rank, latent.kv_rank
    J, keys_and_values = C + latent.rope_head_dim, H - latent.rope_head_dim + latent.value_head_dim
    if Q:
        queries = {
            "w_q_down_DQ": _dense((D, Q), D, 0, (*over, TENSOR)),
            "norm_q_Q": _norm(Q, over),
            "w_q_up_QNH": _dense((Q, N, H), Q, 0, over, dim1=heads),
        }
    else:
        queries = {"w_q_DNH": _dense((D, N, H), D, 0, over, dim1=heads)}
    return queries | {
        "w_kv_down_DJ": _dense((D, J), D, 0, (*over, TENSOR)),
        "norm_kv_C": _norm(C, over),
        "w_kv_up_CNH": _dense((C, N, keys_and_values), C, 0, over, dim1=heads),
    }


_HEADS: dict[AttentionKind, Callable[[ModelConfig, Axes], dict[str, Param]]] = {
    "grouped": _grouped_heads,
    "latent": _latent_heads,
}


def _feed_forward(m: ModelConfig, d_ff: int, over: Axes) -> dict[str, Param]:
    """A SwiGLU that every token visits. Tokens are already split over `tensor`, so its weights are gathered whole."""
    return {
        "w_in_DGF": _dense((m.d_model, 2, d_ff), m.d_model, 0, over),
        "w_out_FD": _dense((d_ff, m.d_model), 2 * m.num_layers * d_ff, 1, over),
    }


def _experts(m: ModelConfig, expert_axes: Axes) -> dict[str, Param]:
    width: Axes = () if TENSOR in expert_axes else (TENSOR,)
    up_std, down_std = m.d_model**-0.5, (2 * m.num_layers * m.d_ff) ** -0.5
    matrix = functools.partial(Param, decay=True, compute_dtype="model")
    return {
        "w_in_EDGF": matrix((m.num_experts, m.d_model, 2, m.d_ff), up_std, (expert_axes, (), (), width)),
        "w_out_EFD": matrix((m.num_experts, m.d_ff, m.d_model), down_std, (expert_axes, width, ())),
    }


def moe_params(m: ModelConfig, dispatch: DispatchConfig) -> dict[str, Any]:
    """The parameters of one mixture-of-experts feed-forward, not stacked."""
    table: dict[str, Any] = {
        "w_router_DE": _dense((m.d_model, m.num_experts), m.d_model, 0, (EXPERT,), "float32"),
        "experts": _experts(m, dispatch.expert_axes),
    }
    if m.router.bias:
        table["router_bias_E"] = Param((m.num_experts,), 0.0, ((),), decay=False, compute_dtype=None)
    if m.shared_d_ff:
        table["shared"] = _feed_forward(m, m.shared_d_ff, (EXPERT, TENSOR))
    if m.shared_gate:
        table["shared"]["w_gate_D"] = _dense((m.d_model,), m.d_model, 0, (EXPERT, TENSOR))
    return table


def param_table(m: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Every parameter of the model, nested as the model uses them: path -> `Param`."""
    stack = (layout.pipeline_repeats, layout.mesh.pipeline, layout.layers_per_chunk(m))
    layer = {
        "attention": _attention(m, (EXPERT,)),
        "moe_norm_D": _norm(m.d_model, (EXPERT,)),
        "moe": moe_params(m, layout.dispatch),
    }
    rows, more = m.padded_vocab_size, m.padded_vocab_size - m.vocab_size
    embedding = Param(  # its rows are looked up in float32; as a tied output layer it is used in the model's dtype
        (rows, m.d_model), EMBEDDING_STD, (VOCAB_AXES, (EXPERT,)), (1, (EXPERT,)),
        padding=((0, more), (0, 0)) if more else (), decay=True, compute_dtype="float32",
    )  # fmt: skip
    table: dict[str, Any] = {
        "embed": {"table_VD": embedding},
        "layers": _map(lambda p: p.stacked(stack, ((), (PIPELINE,), ()), m.num_moe_layers), layer),
        "head": {"norm_D": _norm(m.d_model, (EXPERT,))},
    }
    if not m.tie_embeddings:
        output = _dense((m.d_model, rows), m.d_model, 0, (EXPERT,), dim1=VOCAB_AXES)
        table["head"]["w_DV"] = dataclasses.replace(output, padding=((0, 0), (0, more)) if more else ())
    if m.num_dense_layers:
        # They run before the pipeline, data-parallel over its axis, so that no stage carries them alone.
        dense = {
            "attention": _attention(m, (EXPERT, PIPELINE)),
            "feed_forward_norm_D": _norm(m.d_model, (EXPERT, PIPELINE)),
            "feed_forward": _feed_forward(m, m.dense_d_ff, (EXPERT, PIPELINE, TENSOR)),
        }
        table["dense_layers"] = _map(lambda p: p.stacked((m.num_dense_layers,), ((),), m.num_dense_layers), dense)
    return table


def _is_param(x: object) -> bool:
    return isinstance(x, Param)


def _map(f: Callable[..., Any], table: Any, *rest: Any) -> Any:
    return jax.tree.map(f, table, *rest, is_leaf=_is_param)


def by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a table or of another tree by their dotted path, in the order of `jax.tree.leaves`."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_param)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def param_specs(table: Any) -> Any:
    """The table's PartitionSpecs, in the same nesting."""
    return _map(lambda p: p.spec, table)


def decayed(table: Any) -> Any:
    """Returns whether weight decay pulls each parameter to 0, in the same nesting."""
    return _map(lambda p: p.decay, table)


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
