"""Cases: programs over the 16 virtual devices, with weights and batches that are the same on every layout."""

from __future__ import annotations

import dataclasses
import functools
import math
import zlib
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from reference import oracle
from tiers import full_unless

from moejax.config import (
    AttentionConfig,
    BalanceConfig,
    DispatchConfig,
    LatentConfig,
    ModelConfig,
    RopeConfig,
    RopeScalingConfig,
    RouterConfig,
)
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.metrics import summarize
from moejax.program import Program
from moejax.sharding import Param, param_shapes

MODEL = ModelConfig(
    num_layers=4,
    d_model=32,
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8),
    d_ff=16,
    num_experts=16,
    experts_per_token=2,
    vocab_size=256,
    dtype="float32",
)
GROUPED = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8)
BALANCE = BalanceConfig(  # losses heavy enough that their gradients are seen
    aux_loss_weight=0.1, sequence_loss_weight=0.05, z_loss_weight=0.01, bias_update_rate=0.01
)
FOLDED, SPLIT = ("expert", "tensor"), ("expert",)


@dataclasses.dataclass(frozen=True)
class Case:
    """A model and how it is laid out, in few words, with the weights and the batch that it is tested with."""

    expert: int
    pipeline: int
    tensor: int
    replica: int = 1
    folded: bool = True
    strategy: str = "dropless"
    capacity_factor: float = 1.5
    hosts: int = 1
    chunks: int = 1
    num_microbatches: int = 2
    repeats: int = 1
    remat: str = "none"
    gather: str = "step"
    bubble: str = "skip"
    batch_split: int = 1
    model: ModelConfig = MODEL
    batch_size: int = 16
    seq_len: int = 16
    packed: bool = False

    def __str__(self) -> str:
        """Returns the mesh and how the program lies on it: a test's name."""
        replica = f"{self.replica}x" if self.replica > 1 else ""
        parts = [f"{replica}{self.expert}x{self.pipeline}x{self.tensor}", "folded" if self.folded else "split"]
        return "-".join([*parts, f"R{self.repeats}", self.remat, self.gather, self.bubble])

    @property
    def drops(self) -> bool:
        """Whether an expert can have more assignments than room."""
        return self.strategy == "capacity"

    @property
    def layout(self) -> Layout:
        hosts = self.hosts * self.replica if self.hosts > 1 else 1
        axes = FOLDED if self.folded else SPLIT
        return Layout(
            MeshConfig(self.expert, self.pipeline, self.tensor, self.replica, hosts=hosts),
            self.seq_len,
            self.batch_size,
            num_microbatches=self.num_microbatches,
            pipeline_repeats=self.repeats,
            gather=self.gather,
            remat=self.remat,
            bubble=self.bubble,
            batch_split=self.batch_split,
            dispatch=DispatchConfig(self.strategy, self.capacity_factor, axes, self.hosts > 1, self.chunks),
        )

    @functools.cached_property
    def mesh(self) -> jax.sharding.Mesh:
        config = self.layout.mesh
        return build_mesh(config, jax.devices()[: config.num_devices])

    @property
    def balance(self) -> BalanceConfig:
        """`BALANCE` without a rate where there is no bias."""
        return BALANCE if self.model.router.bias else dataclasses.replace(BALANCE, bias_update_rate=0.0)

    @functools.cached_property
    def program(self) -> Program:
        """Raises `ConfigError` where the layout is not possible."""
        return Program(self.model, self.layout, self.mesh, self.balance)

    def place(self, logical: Any) -> Any:
        """Logical parameters as the program stores them."""
        return jax.tree.map(
            lambda p, w: jax.device_put(_pad(p, w), NamedSharding(self.mesh, p.spec)),
            self.program.table, logical, is_leaf=_is_param,
        )  # fmt: skip

    def unplace(self, stored: Any) -> Any:
        """Stored parameters or their gradients as logical arrays."""
        return jax.tree.map(_unplace, self.program.table, stored, is_leaf=_is_param)

    @functools.cached_property
    def logical_params(self) -> Any:
        return make_params(self.program.table)

    @functools.cached_property
    def batch(self) -> dict[str, np.ndarray]:
        return make_batch(self.model.vocab_size, self.batch_size, self.seq_len, packed=self.packed)

    def place_batch(self, batch: Any) -> Any:
        """Arrays [B, S] as the program takes them."""
        return jax.device_put(batch, NamedSharding(self.mesh, self.program.batch_spec))

    @functools.cached_property
    def capacity_rule(self) -> oracle.CapacityRule:
        """The tokens that meet at an expert: a part of a microbatch of one replica, sender by sender."""
        sizes = (self.replica, self.expert, self.num_microbatches, self.batch_split, -1, self.tensor)
        index = np.arange(self.batch_size * self.seq_len).reshape(*sizes, self.seq_len // self.tensor)
        parts = self.replica * self.num_microbatches * self.batch_split
        tokens_Gn = index.transpose(0, 2, 3, 1, 5, 4, 6).reshape(parts, -1)
        senders = self.expert * self.tensor
        rows = senders * oracle.capacity(tokens_Gn.shape[1] // senders, self.capacity_factor, self.model)
        return oracle.CapacityRule(tokens_Gn, rows)

    def oracle(self) -> tuple[oracle.Result, Any]:
        """Returns the oracle's loss and gradients for this case's weights and batch."""
        rule = self.capacity_rule if self.drops else None
        return _oracle(self.model, self.batch_size, self.seq_len, self.packed, rule and _Hashable(rule), self)

    @functools.cached_property
    def value_and_grad(self) -> Any:
        """(params, batch) -> ((loss, metrics), gradients), compiled over the mesh; summaries are among the metrics."""
        program = self.program
        loss_specs = (program.metric_specs["loss"], program.metric_specs)
        function = program.sharded(
            jax.value_and_grad(program.loss, has_aux=True),
            (program.param_specs, program.batch_spec),
            (loss_specs, program.param_specs),
        )

        def with_summary(params: Any, batch: Any) -> Any:
            (loss, metrics), grads = function(params, batch)
            return (loss, metrics | summarize(metrics, batch, self.model.num_moe_layers)), grads

        return jax.jit(with_summary)

    def trace(self) -> Any:
        """The jaxpr of `value_and_grad`."""
        params = param_shapes(self.program.table, self.mesh)
        batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in self.batch.items()}
        return self.value_and_grad.trace(params, batch).jaxpr.jaxpr

    @functools.cached_property
    def result(self) -> tuple[Any, Any]:
        """Metrics and gradients as they come, for the case's weights and batch."""
        (_, metrics), grads = self.value_and_grad(self.place(self.logical_params), self.place_batch(self.batch))
        return jax.block_until_ready((metrics, grads))


class _Hashable:
    def __init__(self, rule: oracle.CapacityRule) -> None:
        self.rule = rule
        self.key = (rule.tokens_Gn.shape, rule.tokens_Gn.tobytes(), rule.capacity)

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.key == other.key


_oracles: dict[Any, Any] = {}


def _oracle(model: ModelConfig, batch_size: int, seq_len: int, packed: bool, rule: Any, case: Case) -> Any:
    key = (model, batch_size, seq_len, packed, rule)
    if key not in _oracles:
        _oracles[key] = oracle.loss_and_grads(
            case.logical_params, case.batch, model, BALANCE, rule.rule if rule else None
        )
    return _oracles[key]


def _is_param(x: object) -> bool:
    return isinstance(x, Param)


def _logical_shape(p: Param) -> tuple[int, ...]:
    return (p.num_layers, *p.layer_shape) if p.num_stack_dims else p.layer_shape


def _pad(p: Param, logical: Any) -> np.ndarray:
    """One logical array as it is stored: zeros after the vocabulary, and in the places that no layer fills."""
    places = np.zeros((math.prod(p.stack), *p.shape[p.num_stack_dims :]), np.float32)
    places[(slice(p.num_layers), *map(slice, p.layer_shape))] = np.reshape(logical, (p.num_layers, *p.layer_shape))
    return places.reshape(p.shape)


def _unplace(p: Param, stored: Any) -> np.ndarray:
    """One stored array as a logical one; what fills it up has to be 0."""
    places = np.reshape(stored, (math.prod(p.stack), *p.shape[p.num_stack_dims :]))
    logical = places[(slice(p.num_layers), *map(slice, p.layer_shape))].reshape(_logical_shape(p))
    np.testing.assert_array_equal(_pad(p, logical), stored)
    return logical


def make_params(table: Any) -> Any:
    """Logical weights that depend on a parameter's name and logical shape only. Norm scales are not all 1."""

    def make(path: Any, p: Param) -> np.ndarray:
        rng = np.random.default_rng(zlib.crc32(jax.tree_util.keystr(path).encode()))
        normal = rng.standard_normal(_logical_shape(p), np.float32)
        return 1 + np.float32(0.1) * normal if p.std is None else np.float32(max(p.std, 0.1)) * normal

    return jax.tree.map_with_path(make, table, is_leaf=_is_param)


def make_batch(
    vocab_size: int, batch_size: int, seq_len: int, *, packed: bool = False, seed: int = 0
) -> dict[str, np.ndarray]:
    """Random tokens and targets; packed: rows of several documents, each with its own lengths.

    No token comes twice while the vocabulary lasts. Equal tokens that begin a document are routed alike, and which of
    them an expert's capacity leaves out would be rounding's choice.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.permutation(batch_size * seq_len).reshape(batch_size, seq_len).astype(np.int32) % vocab_size
    targets = rng.integers(0, vocab_size, tokens.shape, np.int32)
    segment_ids = np.ones_like(tokens)
    if packed:
        segment_ids += (rng.random(tokens.shape) < 0.2).cumsum(1, dtype=np.int32)
    return {"tokens": tokens, "targets": targets, "segment_ids": segment_ids}


def relative_error(actual: Any, expected: Any) -> float:
    """Largest absolute error over the largest absolute value."""
    expected = np.asarray(expected, np.float64)
    error = np.abs(np.asarray(actual, np.float64) - expected).max()
    scale = np.abs(expected).max()
    return float(error / scale) if scale else float(error)


def variant(**fields: Any) -> ModelConfig:
    """The model of these tests with some fields changed."""
    return dataclasses.replace(MODEL, **fields)


# Together: each axis alone and all at once, replicas, both places for experts, both gathers, every rematerialization,
# one and two repeats, as many microbatches as stages and more, microbatches in parts, idle and busy bubbles, drops,
# packed documents, grouped queries, tied tables, a shared expert, leading dense layers, both scores of the router,
# gates renormalized and not, selection biases.
CI_CASES = (
    Case(
        1, 1, 1, strategy="capacity", repeats=2, batch_split=4,
        model=variant(attention=GROUPED, router=RouterConfig(score="sigmoid", bias=True)),
    ),
    Case(
        16, 1, 1, num_microbatches=1, remat="minimal", gather="layer",
        strategy="capacity", capacity_factor=1.0, hosts=4,
    ),
    Case(
        4, 2, 2, packed=True, repeats=2, remat="collectives", gather="layer", chunks=2, hosts=2, batch_split=2,
        model=variant(attention=GROUPED, router=RouterConfig(score="sigmoid", bias=True)),
    ),
    Case(
        2, 2, 4, folded=False, packed=True, remat="full", bubble="compute",
        model=variant(num_layers=5, num_dense_layers=1, dense_d_ff=24, shared_d_ff=16, tie_embeddings=True),
    ),
    Case(
        2, 2, 2, replica=2, folded=False, repeats=2, gather="layer", strategy="capacity", bubble="compute",
        batch_split=2, model=variant(router=RouterConfig(renormalize=False, bias=True)),
    ),
    Case(1, 4, 4, num_microbatches=8, remat="minimal"),
    Case(
        2, 4, 2, folded=False, repeats=2, num_microbatches=4, remat="collectives", bubble="compute", batch_size=32,
        model=variant(
            num_layers=10, num_dense_layers=2, dense_d_ff=24, shared_d_ff=16, attention=GROUPED,
            router=RouterConfig(score="sigmoid", renormalize=False),
        ),
    ),
)  # fmt: skip


# A case on every axis that is quick to compile.
SMALL = Case(2, 2, 2, model=variant(num_layers=2, router=RouterConfig(score="sigmoid", bias=True)))

# A number of layers that leaves places of the last chunks empty, and whole chunks.
UNEVEN = Case(
    2, 4, 2, repeats=2, num_microbatches=4, gather="layer", remat="minimal", packed=True,
    model=variant(num_layers=9, router=RouterConfig(score="sigmoid", bias=True)),
)  # fmt: skip

# Variants of a layer's mathematics, many at once: all that go together, and the other choice of the rest.
VARIANTS = variant(
    num_layers=6, num_dense_layers=1, dense_d_ff=24, shared_d_ff=16, shared_gate=True, tie_embeddings=True,
    attention=dataclasses.replace(GROUPED, qk_norm="projection", bias=True, output_bias=True, multiplier=0.2),
    rope=RopeConfig(rotary_dim=4, scaling=RopeScalingConfig("yarn", 4.0, 512)),
    router=RouterConfig(score="sigmoid", bias=True, scaling=2.5),
    embedding_multiplier=3.0, residual_multiplier=0.7, logits_divisor=2.0, vocab_size=251,
)  # fmt: skip
OTHER_VARIANTS = variant(
    attention=dataclasses.replace(GROUPED, qk_norm="head", bias=True), router=RouterConfig(scaling=0.5),
    rope=RopeConfig(scaling=RopeScalingConfig("llama3", 4.0, 16)), vocab_size=49,
)  # fmt: skip
LATENT = variant(  # as DeepSeek-V3 has it
    num_layers=5, num_dense_layers=1, dense_d_ff=24, shared_d_ff=16, norm_eps=1e-5,
    attention=AttentionConfig(4, 4, 12, multiplier=0.4, latent=LatentConfig(16, 24, 4, 6)),
    rope=RopeConfig(scaling=RopeScalingConfig("yarn", 4.0, 512, attention_factor=1.0)),
    router=RouterConfig("sigmoid", bias=True, scaling=2.5, num_groups=4, groups_per_token=2),
)  # fmt: skip
OTHER_LATENT = variant(  # as DeepSeek-V2-Lite has attention, and V2 groups
    attention=AttentionConfig(4, 4, 12, output_bias=True, latent=LatentConfig(16, 0, 4, 12)),
    router=RouterConfig(renormalize=False, num_groups=8, groups_per_token=3),
)  # fmt: skip
VARIANT_CASES = (
    Case(1, 1, 1, model=VARIANTS, packed=True),
    Case(4, 2, 2, model=VARIANTS, packed=True, gather="layer", remat="minimal", bubble="compute"),
    Case(2, 1, 2, model=OTHER_VARIANTS, replica=2, folded=False, remat="full"),
    UNEVEN,
    Case(1, 1, 1, model=LATENT, packed=True, remat="collectives"),
    Case(4, 2, 2, model=LATENT, packed=True, gather="layer"),
    Case(2, 2, 2, model=OTHER_LATENT, replica=2, folded=False, repeats=2, remat="minimal", bubble="compute"),
    Case(1, 4, 1, model=variant(num_layers=7, num_dense_layers=1, dense_d_ff=24), remat="none", bubble="compute"),
)


def tiered(cases: Iterable[Case]) -> list[Any]:
    """Returns cases as a test's parameters: one of 16 devices, on every axis, is in the fast tier, four in the slow."""
    return full_unless(CI_CASES[2].__eq__, cases, slow=[CI_CASES[i] for i in (0, 1, 5, 6)].__contains__)


def per_device_values(x: jax.Array) -> list[list[np.ndarray]]:
    """What each device holds of `x`, those that must be equal together."""
    by_index: dict[Any, list[np.ndarray]] = {}
    for shard in x.addressable_shards:
        by_index.setdefault(str(shard.index), []).append(np.asarray(shard.data))
    return list(by_index.values())
