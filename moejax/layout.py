"""Layout: how one step is cut into parts and placed on the mesh. With the model it decides what every device does.

A step of `batch_size` sequences is cut like this, from the outside in:

    batch_size                    sequences of an optimizer step, over the whole mesh
      / grad_accumulation_steps   slices, one forward and backward pass each
      / batch axes                replica × expert devices, each with its own sequences
      / num_microbatches          for the pipeline
      / batch_split               parts that a layer works on side by side
    x seq_len / tensor            tokens of a sequence on one device between attention blocks

Everything else that follows from a layout is a property of it or a function of it and the model, and has its home here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, Protocol

from moejax.checks import ConfigError, check, check_not_negative, check_positive, check_types
from moejax.compiler import Platform
from moejax.config import VOCAB_UNIT, DispatchConfig, ModelConfig
from moejax.mesh import EXPERT, PIPELINE, TENSOR, MeshConfig

Gather = Literal["step", "layer"]
Remat = Literal["auto", "none", "minimal", "collectives", "full"]
Bubble = Literal["auto", "skip", "compute"]

REMAT_LADDER: tuple[Remat, ...] = ("none", "minimal", "collectives", "full")  # from the most memory to the least
REMAT_ABOVE = 2048  # tokens: longer sequences are rematerialized with remat="auto"
VOCAB_AXES = (PIPELINE, TENSOR)


class DoesNotFitError(ConfigError):
    """No layout of the step fits in a device's memory: the message names what takes most, and what would fit."""


class AxisSizes(Protocol):
    """A mesh, or the configuration of one."""

    @property
    def shape(self) -> Mapping[str, int]: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """How one step of a model is cut and placed. `check` says whether a model fits; `resolve` replaces each "auto".

    Each stage of the pipeline holds `pipeline_repeats` separate chunks of layers (1: GPipe; more: interleaved). Chunks
    have equally many layers; where these don't divide evenly, the last chunks have fewer or none. With one stage,
    `pipeline_repeats` and `bubble` change nothing. `gather` says when dense weights are gathered from their
    shards: once per step (ZeRO-1-like) or layer by layer (FSDP). `remat="auto"` keeps activations up to 2,048 tokens
    and recomputes above. `bubble` says whether a stage without work skips it or computes what nobody uses; "auto" skips
    on CPUs, whose virtual devices share cores, and computes on accelerators, which would only wait (see
    `moejax.pipeline`).

    A layer works on `batch_split` equal parts of a microbatch side by side, so that one part's tokens can be exchanged
    while another's are computed; capacity is then counted in each part. 0 is auto: 2 on accelerators that exchange any
    and where it divides the sequences, otherwise 1.

    Raises:
      ConfigError: a field that no mesh and no model could have.
    """

    mesh: MeshConfig = MeshConfig()
    seq_len: int = 256  # tokens per sequence
    batch_size: int = 32  # sequences per optimizer step, over the whole mesh
    grad_accumulation_steps: int = 1  # forward-backward passes per optimizer step
    num_microbatches: int = 2  # parts of a device's sequences, for the pipeline
    pipeline_repeats: int = 1  # chunks of layers per pipeline stage; 1 is GPipe, more is interleaved
    gather: Gather = "step"  # when dense weights are gathered, as in ZeRO-1 or as in FSDP
    remat: Remat = "auto"  # what the backward pass recomputes; auto: nothing up to 2,048 tokens, then all
    bubble: Bubble = "auto"  # what a pipeline stage without work does; auto: skip on CPUs, else compute
    batch_split: int = 0  # parts of a microbatch that a layer works on side by side; 0: auto
    dispatch: DispatchConfig = DispatchConfig()

    def __post_init__(self) -> None:
        check_types(self)
        check_positive(self, "seq_len", "batch_size", "grad_accumulation_steps", "num_microbatches", "pipeline_repeats")
        check_not_negative(self, "batch_split")

    def replace(self, **fields: Any) -> Layout:
        """Returns the layout with other values; those of `DispatchConfig`'s fields go to `dispatch`."""
        dispatch = {name: fields.pop(name) for name in _DISPATCH_FIELDS & fields.keys()}
        if dispatch:
            fields["dispatch"] = dataclasses.replace(fields.get("dispatch", self.dispatch), **dispatch)
        return dataclasses.replace(self, **fields)

    def resolve(self, platform: Platform | None = None) -> Layout:
        """Returns the layout with every "auto" replaced by what it means on `platform`, by default the mesh's own."""
        on_cpu = (platform or self.mesh.platform) == "cpu"
        overlaps = self.exchanges and not on_cpu  # virtual devices share cores, so nothing could run meanwhile
        remat, bubble = self.remat, self.bubble
        if remat == "auto":
            remat = "none" if self.seq_len <= REMAT_ABOVE else "full"
        if bubble == "auto":
            bubble = "skip" if on_cpu else "compute"
        parts = self.batch_split or math.gcd(self.sequences_per_microbatch, 2 if overlaps else 1)
        return dataclasses.replace(self, remat=remat, bubble=bubble, batch_split=parts)

    # Sizes. Those of a part need a `batch_split` that is resolved.

    @property
    def tokens(self) -> int:
        """Tokens of one step, over all devices."""
        return self.batch_size * self.seq_len

    @property
    def exchanges(self) -> bool:
        """Whether tokens leave their device for their experts."""
        return self.mesh.expert * self.mesh.tensor > 1

    @property
    def exchange_hosts(self) -> int:
        """Hosts that tokens are exchanged between in a hop of its own; 1 where one hop takes them anywhere."""
        return self.mesh.hosts_along(EXPERT) if self.dispatch.hierarchical else 1

    @property
    def batch_shards(self) -> int:
        """Devices with sequences of their own."""
        return self.mesh.replica * self.mesh.expert

    @property
    def sequences_per_slice(self) -> int:
        """Sequences of one device in one forward and backward pass."""
        return self.batch_size // (self.grad_accumulation_steps * self.batch_shards)

    @property
    def sequences_per_microbatch(self) -> int:
        return self.sequences_per_slice // self.num_microbatches

    @property
    def sequences_per_part(self) -> int:
        """Sequences that a layer works on at a time."""
        return self.sequences_per_microbatch // max(1, self.batch_split)

    @property
    def local_seq_len(self) -> int:
        """Tokens of a sequence on one device, between attention blocks."""
        return self.seq_len // self.mesh.tensor

    @property
    def tokens_per_part(self) -> int:
        """Tokens that one device dispatches at a time."""
        return self.sequences_per_part * self.local_seq_len

    @property
    def ticks(self) -> int:
        """Length of the pipeline's schedule, of which `mesh.pipeline - 1` ticks are bubble on every stage."""
        return self.pipeline_repeats * self.num_microbatches + self.mesh.pipeline - 1

    def capacity(self, model: ModelConfig) -> int:
        """Rows that one device reserves for one expert when it dispatches a part: a multiple of `dispatch.chunks`."""
        return self.dispatch.capacity(self.tokens_per_part, model)

    def layers_per_chunk(self, model: ModelConfig) -> int:
        """Layers that a stage does in one tick; the last chunks may have fewer or none."""
        return math.ceil(model.num_moe_layers / (self.pipeline_repeats * self.mesh.pipeline))

    def idle_share(self, model: ModelConfig) -> float:
        """Share of the pipeline's time that stages wait, on average: bubble, and layers that other chunks have more."""
        worked = self.num_microbatches * model.num_moe_layers
        return 1 - worked / (self.mesh.pipeline * self.ticks * self.layers_per_chunk(model))

    def batch_parts(self, model: ModelConfig) -> dict[str, int]:
        """Returns into how many parts what cuts the batch; `batch_size` must be a multiple of their product."""
        parts = {"replica": self.mesh.replica, "expert": self.mesh.expert, "num_microbatches": self.num_microbatches}
        parts["batch_split"] = max(1, self.batch_split)
        if model.num_dense_layers:
            parts["pipeline (leading dense layers run data-parallel over it)"] = self.mesh.pipeline
        return parts | {"grad_accumulation_steps": self.grad_accumulation_steps}

    def batch_unit(self, model: ModelConfig) -> int:
        """Returns what `batch_size` must be a multiple of."""
        return math.prod(self.batch_parts(model).values())

    def check(self, model: ModelConfig, *, batch: bool = True) -> None:
        """Checks that the model, and with `batch` the sequences too, can be divided as the layout says.

        Raises:
          ConfigError: naming what cannot, and what would be right.
        """
        m, mesh = model, self.mesh
        check_experts(m, self.dispatch, mesh)
        check_hops(self.dispatch, self.exchange_hosts, f"mesh.hosts={mesh.hosts}, mesh.host_axis={mesh.host_axis}")
        check_divides("attention.num_heads", m.attention.num_heads, "tensor", mesh.tensor)
        check_divides("attention.num_kv_heads", m.attention.num_kv_heads, "tensor", mesh.tensor)
        axes, size = ("expert × pipeline", mesh.expert * mesh.pipeline) if m.num_dense_layers else (EXPERT, mesh.expert)
        if m.num_dense_layers or m.attention.kind == "latent":
            check_divides("d_model", m.d_model, f"{axes} × tensor", size * mesh.tensor)
        for name in ("kv_rank", "q_rank"):
            check_divides(f"attention.latent.{name}", getattr(m.attention.latent, name), axes, size)
        vocab_parts = mesh.pipeline * mesh.tensor
        check(
            m.padded_vocab_size % vocab_parts == 0,
            f"vocab_size={m.vocab_size} has {m.padded_vocab_size} rows with padding, which must be a multiple of "
            f"pipeline × tensor = {vocab_parts}; use another mesh, or a multiple of "
            f"{math.lcm(VOCAB_UNIT, vocab_parts)}",
        )
        layers = "num_layers" if not m.num_dense_layers else "num_layers - num_dense_layers"
        chunks = mesh.pipeline * self.pipeline_repeats
        check(
            chunks <= m.num_moe_layers,
            f"{layers}={m.num_moe_layers} must be at least pipeline × pipeline_repeats = {chunks}",
        )
        if mesh.pipeline == 1:  # else fewer layers in some chunks cost no time: their stages wait for the others
            check_divides(layers, m.num_moe_layers, "pipeline_repeats", self.pipeline_repeats)
        check(
            self.pipeline_repeats == 1 or self.num_microbatches >= mesh.pipeline,
            f"num_microbatches={self.num_microbatches} must be at least the pipeline's {mesh.pipeline} stages "
            f"when pipeline_repeats={self.pipeline_repeats}",
        )
        if not batch:
            return
        check(self.seq_len <= m.max_seq_len, f"seq_len={self.seq_len} must be at most max_seq_len={m.max_seq_len}")
        check(
            self.seq_len % mesh.tensor == 0, f"seq_len={self.seq_len} must be a multiple of tensor axis {mesh.tensor}"
        )
        unit = self.batch_unit(m)
        product = " × ".join(f"{k} {v}" for k, v in self.batch_parts(m).items() if v > 1)
        nearest = max(unit, self.batch_size // unit * unit)
        check(
            self.batch_size % unit == 0,
            f"batch_size={self.batch_size} must be a multiple of {unit} = {product}; try {nearest}",
        )

    def smaller(self, model: ModelConfig) -> Iterator[Layout]:
        """Yields layouts of the same step in less memory and more time, each with what those before it have changed.

        1. Smaller microbatches: more `num_microbatches`, then more `grad_accumulation_steps`, down to one sequence on a
           device.
        2. Stronger rematerialization: `none`, `minimal`, `collectives`, `full`.

        They compute the same, to rounding. What would change the loss is left out: smaller microbatches under the
        strategy "capacity", whose drops are counted in each.
        """
        layout = self
        same_loss = self.dispatch.strategy != "capacity"
        while same_loss and (factor := _least_factor(self.batch_size // layout.batch_unit(model))) > 1:
            layout = dataclasses.replace(layout, num_microbatches=layout.num_microbatches * factor)
            yield layout
        while same_loss and (factor := _least_factor(layout.num_microbatches)) > 1:
            fewer = layout.num_microbatches // factor
            if layout.pipeline_repeats > 1 and fewer < layout.mesh.pipeline:
                break  # interleaving needs one for each stage
            # As many microbatches in more passes, each of which keeps the activations of fewer of them.
            slices = layout.grad_accumulation_steps * factor
            layout = dataclasses.replace(layout, grad_accumulation_steps=slices, num_microbatches=fewer)
            yield layout
        policy = self.resolve().remat
        for stronger in REMAT_LADDER[REMAT_LADDER.index(policy) + 1 :]:
            layout = dataclasses.replace(layout, remat=stronger)
            yield layout


_DISPATCH_FIELDS = {field.name for field in dataclasses.fields(DispatchConfig)}


def _least_factor(number: int) -> int:
    """The least prime factor, 1 of 1."""
    return next((factor for factor in range(2, number + 1) if number % factor == 0), 1)


def check_divides(name: str, value: int, axes: str, size: int) -> None:
    """Raises `ConfigError` unless `size`, the product of `axes`, divides `value`; says which of either would do."""
    if value % size == 0:
        return
    *more, largest = (str(d) for d in range(1, min(size, 2**16)) if value % d == 0)
    divisors = f"{', '.join(more)} or {largest}" if more else largest
    nearest = math.ceil(value / size) * size
    raise ConfigError(
        f"{name}={value} must be a multiple of {axes} = {size}; try {name}={nearest}, or {axes} = {divisors}"
    )


def check_experts(m: ModelConfig, dispatch: DispatchConfig, mesh: AxisSizes) -> None:
    """Raises `ConfigError` where one mixture-of-experts feed-forward does not fit on a mesh."""
    expert, tensor = mesh.shape[EXPERT], mesh.shape[TENSOR]
    experts_over = math.prod(mesh.shape[a] for a in dispatch.expert_axes)
    check_divides("num_experts", m.num_experts, " × ".join(dispatch.expert_axes), experts_over)
    check_divides("d_model", m.d_model, "expert", expert)
    if TENSOR not in dispatch.expert_axes:
        check_divides("d_ff", m.d_ff, "tensor", tensor)
    if m.shared_d_ff:
        check_divides("d_model", m.d_model, "expert × tensor", expert * tensor)


def check_hops(dispatch: DispatchConfig, exchange_hosts: int, mesh: str) -> None:
    """Raises `ConfigError` where a hierarchical dispatch has one host alone; `mesh` describes the mesh."""
    check(
        not dispatch.hierarchical or exchange_hosts > 1,
        f"dispatch.hierarchical=True has no hosts to go between: the expert axis of {mesh} is inside one host; use "
        "dispatch.hierarchical=False",
    )


def check_layouts(layouts: tuple[Layout, ...]) -> None:
    """Raises `ConfigError` unless the layouts of one run ascend in length and take the same devices."""
    check(len(layouts) > 0, "layouts=() must hold one at least")
    lengths = [layout.seq_len for layout in layouts]
    check(lengths == sorted(set(lengths)), f"layouts have seq_len={lengths}, which must ascend")
    for name in ("num_devices", "hardware", "hosts"):
        values = [getattr(layout.mesh, name) for layout in layouts]
        check(len(set(values)) == 1, f"layouts have mesh.{name}={values}, which must be the same for all")
