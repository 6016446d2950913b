"""One mixture-of-experts layer, twice: through a dispatcher over the virtual devices, and dense in float64.

The choice of experts is an input, so that a test says where each token goes; gates are a softmax over the chosen
experts' logits, so that their gradient reaches the router's weights. The dense layer shares no code with moejax.

Dimensions: N tokens of all devices, T of one, d devices, K experts a token, E experts, D model, G=2 (gate, up), F
feed-forward.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P
from reference import oracle

from moejax import remat
from moejax.config import DispatchConfig, ModelConfig
from moejax.dispatch import Assignments, Exchange, Experts, dispatch
from moejax.kernels.manual import vary
from moejax.mesh import PIPELINE, MeshConfig, build_mesh
from moejax.nn.experts import grouped_experts, split_experts, whole_experts
from moejax.sharding import moe_params, param_specs

T, K, E, D, F = 12, 2, 16, 8, 16
MODEL = ModelConfig(d_model=D, d_ff=F, num_experts=E, experts_per_token=K, dtype="float32")


@dataclasses.dataclass(frozen=True)
class Layer:
    """The layer on a mesh; every device of it has T tokens of its own."""

    expert: int
    pipeline: int
    tensor: int
    replica: int = 1
    strategy: str = "dropless"
    capacity: int = 2
    folded: bool = True
    hosts: int = 1
    chunks: int = 1
    wire_dtype: str = "compute"
    depth: int = 0  # 0: once, by itself; else so many times in a checkpointed scan over a cond, as in the pipeline
    policy: str = "none"

    def __str__(self) -> str:
        mesh = "x".join(map(str, self.mesh_config.shape.values()))
        places = "folded" if self.folded else "split"
        return f"{self.strategy}-{mesh}-{places}-hosts{self.hosts}-chunks{self.chunks}-capacity{self.capacity}"

    @property
    def mesh_config(self) -> MeshConfig:
        return MeshConfig(self.expert, self.pipeline, self.tensor, self.replica)

    @property
    def num_tokens(self) -> int:
        return self.mesh_config.num_devices * T

    @property
    def expert_axes(self) -> tuple[str, ...]:
        return ("expert", "tensor") if self.folded else ("expert",)

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        return build_mesh(self.mesh_config, jax.devices()[: self.mesh_config.num_devices])

    @functools.cached_property
    def program(self) -> Any:
        """(weights, x_ND, expert_NK, cotangent_ND) -> (y_ND, dropped_d, rounds_d), (gradient of weights, of x)."""
        by_device = P(self.mesh.axis_names)
        table = moe_params(MODEL, DispatchConfig(expert_axes=self.expert_axes))
        weight_specs = {"router": P(), "experts": param_specs(table["experts"])}
        in_specs = (weight_specs, by_device, by_device, by_device, by_device, by_device)
        out_specs = ((by_device,) * 3, (weight_specs, by_device))
        program = jax.jit(jax.shard_map(self._device, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs))
        return lambda weights, x_ND, expert_NK, cotangent_ND: program(
            weights, x_ND, cotangent_ND, expert_NK, *line_up_by_hand(expert_NK)
        )

    def _device(
        self, weights: Any, x_TD: Any, cotangent_TD: Any, expert_TK: Any, position_TK: Any, count_1E: Any
    ) -> Any:
        def layer(weights: Any, x_TD: Any) -> Any:
            gate_TK = gates(weights["router"], x_TD, expert_TK)
            assignments = Assignments(gate_TK, expert_TK, position_TK, count_1E[0])
            on_buffers = whole_experts if self.folded else split_experts
            experts = Experts(weights["experts"], on_buffers, grouped_experts)
            exchange = Exchange(
                self.strategy, self.expert_axes, self.hosts, self.capacity, self.chunks, self.wire_dtype
            )
            y_TD, stats, _ = dispatch(x_TD, assignments, experts, exchange)
            return y_TD, (stats.dropped, vary(stats.rounds, self.mesh.axis_names))

        def loss(weights: Any, x_TD: Any) -> Any:
            y_TD, stats = layer(weights, x_TD) if not self.depth else in_pipeline(layer, self, weights, x_TD)
            return (y_TD * cotangent_TD).sum(), (y_TD, *(s[None] for s in stats))

        (_, out), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x_TD)
        return out, grads


def in_pipeline(layer: Any, setup: Layer, weights: Any, x_TD: Any) -> Any:
    """`depth` layers and residuals of each stage in turn, one a tick, idle at other ticks: `moejax.pipeline`'s nesting.

    A stage's layers see its own tokens alone, so the ticks change nothing.
    """
    weights = jax.tree.map(lambda w: vary(w, (PIPELINE,)), weights)
    stats = (vary(jnp.zeros(()), setup.mesh.axis_names),) * 2

    def stage(x_TD: Any) -> Any:
        def one(carry: Any, _: None) -> Any:
            x_TD, stats = carry
            y_TD, more = layer(weights, x_TD)
            return (x_TD + y_TD, jax.tree.map(jnp.add, stats, more)), None

        return lax.scan(one, (x_TD, stats), None, length=setup.depth)[0]

    @functools.partial(remat.checkpoint, policy=setup.policy)
    def work(live: Any, x_TD: Any) -> Any:
        return lax.cond(live, stage, lambda x_TD: (x_TD, stats), x_TD)

    def tick(carry: Any, t: Any) -> Any:
        x_TD, stats = carry
        x_TD, more = work(t == lax.axis_index(PIPELINE), x_TD)
        return (x_TD, jax.tree.map(jnp.add, stats, more)), None

    return lax.scan(tick, (x_TD, stats), jnp.arange(setup.pipeline, dtype=jnp.int32))[0]


def gates(w_DE: Any, x_ND: Any, expert_NK: Any) -> Any:
    """Softmax over the chosen experts' logits; 0 for the expert E, which is none."""
    logits_NK = jnp.take_along_axis(x_ND @ w_DE, jnp.minimum(expert_NK, E - 1), axis=1)
    return jnp.where(expert_NK < E, jax.nn.softmax(logits_NK, axis=-1), jnp.zeros((), x_ND.dtype))


def line_up_by_hand(expert_NK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of each device's assignments in the experts' lines, and the lines' lengths [d, E]."""
    position_NK = np.zeros_like(expert_NK)
    count_dE = np.zeros((len(expert_NK) // T, E + 1), np.int32)
    for n, k in np.ndindex(*expert_NK.shape):
        line = count_dE[n // T]
        position_NK[n, k] = line[expert_NK[n, k]]
        line[expert_NK[n, k]] += 1
    return position_NK, count_dE[:, :E]


def rounds_by_hand(layer: Layer, expert_NK: np.ndarray) -> np.ndarray:
    """Of each device: the rounds that the longest line among those it exchanges with takes."""
    _, count_dE = line_up_by_hand(expert_NK)
    sizes = (layer.replica, layer.expert, layer.pipeline, layer.tensor)
    if layer.expert * layer.tensor == 1 and layer.strategy != "capacity":
        return np.ones(len(count_dE))  # nothing travels
    if layer.strategy == "ragged":
        longest, capacity = _most_received(layer, count_dE.reshape(*sizes, E))
    else:
        longest, capacity = count_dE.max(-1).reshape(sizes).max(axis=(1, 3), keepdims=True), layer.capacity
    return np.broadcast_to(np.maximum(-(-longest // capacity), 1), sizes).reshape(-1)


def _most_received(layer: Layer, count: np.ndarray) -> tuple[np.ndarray, int]:
    """The most rows that a device gets in a chunk, by replica and stage, and the rows of its buffer."""
    senders = (1, 3) if layer.folded else (1,)
    n = layer.expert * (layer.tensor if layer.folded else 1)
    ends = [count * chunk // layer.chunks for chunk in range(layer.chunks + 1)]
    received = [(end - start).sum(senders, keepdims=True) for start, end in itertools.pairwise(ends)]
    by_receiver = [x.reshape(*x.shape[:-1], n, E // n).sum(-1).max(-1) for x in received]
    longest = np.max(by_receiver, axis=0).max(axis=(1, 3), keepdims=True)
    return longest, min(layer.capacity * E // layer.chunks, n * T * K)


def make_weights(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    w_router_DE, w_in_EDGF, w_out_EFD = (
        rng.standard_normal(shape, np.float32) / np.float32(math.sqrt(shape[-2] if shape != (E, D, 2, F) else D))
        for shape in ((D, E), (E, D, 2, F), (E, F, D))
    )
    return {"router": w_router_DE, "experts": {"w_in_EDGF": w_in_EDGF, "w_out_EFD": w_out_EFD}}


def make_tokens(num_tokens: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Tokens, and the gradient of their results."""
    rng = np.random.default_rng(seed)
    return tuple(rng.standard_normal((2, num_tokens, D), np.float32))


def dense(
    weights: Any, x_ND: Any, expert_NK: np.ndarray, cotangent_ND: Any, kept_NK: np.ndarray | None = None, depth: int = 0
) -> tuple[np.ndarray, Any]:
    """The layer's results and gradients in float64, every expert on every token; `kept_NK` says what counts."""
    kept_NK = np.ones(expert_NK.shape, bool) if kept_NK is None else kept_NK
    return _dense((weights, x_ND, cotangent_ND), expert_NK, kept_NK, depth)


@oracle.in_float64
@functools.partial(jax.jit, static_argnums=3)
def _dense(inputs: Any, expert_NK: Any, kept_NK: Any, depth: int) -> Any:
    weights, x_ND, cotangent_ND = inputs

    def layer(weights: Any, x_ND: Any) -> Any:
        gate_NK = jnp.where(kept_NK, gates(weights["router"], x_ND, expert_NK), 0.0)
        gate_NE = jnp.einsum("nk,nke->ne", gate_NK, jax.nn.one_hot(expert_NK, E))
        return oracle.experts(weights["experts"], x_ND, gate_NE)

    def loss(weights: Any, x_ND: Any) -> Any:
        y_ND = x_ND if depth else layer(weights, x_ND)
        for _ in range(depth):
            y_ND = y_ND + layer(weights, y_ND)
        return (y_ND * cotangent_ND).sum(), y_ND

    (_, y_ND), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(weights, x_ND)
    return y_ND, grads
