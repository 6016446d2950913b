"""Peak memory of one device, by category, in closed form: what a search asks thousands of times.

All devices run one program, so all hold the same: the vocabulary is spread over the stages, leading dense layers run
data-parallel over them, and each stage computes in every tick. What is live when was read off the compilers' buffer
assignments (`xla_dump_to`), the numbers of buffers below with it; nothing is a fitted factor. The peak is that of one
of a few moments:

- `backward`: inside the backward pass of one layer of the pipeline. Live are the train state, what the ticks have
  saved, a copy of the slice of it that is this tick's, gradients in float32 (the sum over ticks, and this tick's),
  gathered weights, and what the layer itself works with: weights cut out of their stack, their casts and gradients, and
  the buffers of a dispatch's rounds.
- `loss`: the logits of one microbatch, their softmax and their gradient, on top of what the ticks have saved.
- `update`: the optimizer's, with gradients scattered to where parameters are stored.

experiments/results/memory_audit.md compares. Not seen by it: a TPU's allocator takes 1.3% more than the peak, and
XLA recomputes a little by itself (1% or less was seen) where a GPU's peak is above 0.8 of its memory.

Letters: a bytes of an activation, T tokens of a layer's part on one device, A those of its attention (all of the
sequence), X rows that arrive at this device's experts, W parameters of its experts in one layer, P of the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from moejax.checks import ConfigError
from moejax.config import AttentionConfig, ModelConfig
from moejax.layout import Layout
from moejax.planner.work import Mode

Moment = Literal["backward", "loss", "update", "serve"]

_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device at the moment of the step's peak; `peak_bytes` is their sum."""

    moment: Moment
    parameters: float  # stored shards, float32 for training
    optimizer: float  # AdamW's two moments
    batch: float  # tokens, targets and segments
    gradients: float
    compute_copies: float  # dense weights gathered once a step
    activations: float  # what the remat policy saves, over the schedule's ticks
    dispatch_buffers: float  # of the layer whose backward pass runs
    workspace: float  # the rest of that layer: weights' casts and gradients, attention, hidden rows
    logits: float
    kv_cache: float
    temporaries: float  # what the compiler cuts out of stacks before a loop uses it: a tick's activations, weights

    @property
    def peak_bytes(self) -> float:
        return sum(self.categories.values())

    @property
    def largest(self) -> str:
        """The category that takes most."""
        categories = self.categories
        return max(categories, key=categories.__getitem__)

    @property
    def categories(self) -> dict[str, float]:
        """Bytes by name."""
        fields = dataclasses.fields(self)[1:]
        return {field.name: getattr(self, field.name) for field in fields}


def predict_memory(model: ModelConfig, layout: Layout, mode: Mode = "train") -> Memory:
    """What a device holds at the peak of one step. The model must fit the layout (`Layout.check`)."""
    if mode != "train":
        return _serve(model, layout, mode)
    s = Sizes(model, layout)
    return max((_backward(s), _loss(s), _update(s)), key=lambda memory: memory.peak_bytes)


class Sizes:
    """Elements and rows of one device that the moments are made of."""

    def __init__(self, model: ModelConfig, layout: Layout) -> None:
        layout = layout.resolve()
        m, mesh, dispatch = model, layout.mesh, layout.dispatch
        e, p, t = mesh.expert, mesh.pipeline, mesh.tensor
        self.model, self.layout, self.a = model, layout, _ITEMSIZE[m.dtype]
        self.on_tpu = mesh.platform == "tpu"
        self.policy = layout.remat
        self.gather_step = layout.gather == "step"
        self.folded = "tensor" in dispatch.expert_axes
        self.width = 1 if self.folded else t
        over = e * t if self.folded else e  # devices that experts are spread over

        # The schedule: sequences and tokens of a microbatch and of its parts.
        self.ticks, self.parts = layout.ticks, layout.batch_split
        self.chunk = layout.layers_per_chunk(m)
        self.layers = layout.pipeline_repeats * self.chunk
        self.batch_tokens = layout.tokens // layout.batch_shards
        self.sequences = layout.sequences_per_microbatch
        self.microbatch = self.sequences * layout.seq_len // t
        self.T = self.microbatch // self.parts
        self.A = self.T * t

        # Parameters of one layer, as used, on one device.
        used, everywhere = (_matrices(m.attention.projections(m.d_model, n)) for n in (t, 1))
        ranks, vectors = m.attention.latent.q_rank + m.attention.latent.kv_rank, 2 + m.attention.output_bias
        of_heads = _vectors_of_heads(m.attention, t)
        norms = m.d_model * vectors + ranks
        self.P = used + m.d_model * (3 * m.shared_d_ff + m.shared_gate + m.num_experts) + norms + of_heads
        self.W = 3 * m.d_model * m.d_ff * m.num_experts // (over * self.width)
        self.P_stored = (
            (everywhere + m.d_model * (3 * m.shared_d_ff + m.shared_gate)) / (e * t)
            + (m.d_model * m.num_experts + norms) / e
            + of_heads
        )
        self.dense_layer = used + 3 * m.d_model * m.dense_d_ff + norms + of_heads if m.num_dense_layers else 0
        spread = ((everywhere + 3 * m.d_model * m.dense_d_ff) / t + norms) / (e * p) + of_heads
        dense_stored = m.num_dense_layers * spread
        self.vocab = m.padded_vocab_size // (p * t)
        tables = 1 if m.tie_embeddings else 2
        self.table = self.vocab * m.d_model
        self.stored = self.layers * (self.P_stored + self.W) + dense_stored + (tables * self.table + m.d_model) / e

        # Rows of the dispatch.
        capacity = dispatch.capacity(self.T, m)
        self.assignments = self.T * m.experts_per_token
        self.sent = capacity * m.num_experts  # rows of a sender's buffers
        self.X = self.sent * self.width
        if dispatch.strategy == "ragged":
            self.sent = min(self.sent, over * self.assignments)
            self.X = self.sent * self.width
        if not layout.exchanges:
            self.sent = self.X = self.assignments
        by_row = dispatch.strategy == "ragged" or not layout.exchanges
        self.sent_rows = self.assignments if by_row else self.sent

    @property
    def state(self) -> dict[str, float]:
        """The categories that last for the whole step."""
        stored = self.stored * _FLOAT32
        return {"parameters": stored, "optimizer": 2 * stored, "batch": 3.0 * 4 * self.batch_tokens}

    def saved_attention(self, tokens: float) -> float:
        """Bytes that the policy saves of the attention of tokens that lie on this device, the layer's input with it."""
        m, a, t = self.model, self.a, self.layout.mesh.tensor
        if self.policy == "full":
            return a * m.d_model * tokens
        total = a * m.d_model * (2 + t) * tokens  # input, gathered over `tensor`, scattered after
        if self.policy != "collectives":  # queries, keys, values, results and the softmax's normalizer
            total += tokens * (a * _projected(m, t) + _FLOAT32 * m.attention.num_heads)
        if m.attention.qk_norm == "projection":  # a mean of squares for all queries of a token, and one for its keys
            total += tokens * t * _FLOAT32 * 2
        elif m.attention.qk_norm == "head" and self.policy == "none":  # sums of squares of each head
            total += tokens * _FLOAT32 * (m.attention.num_heads + m.attention.num_kv_heads)
        elif m.attention.kind == "latent" and self.policy == "none":  # sums of squares of each latent
            total += tokens * t * _FLOAT32 * (1 + (m.attention.latent.q_rank > 0))
        return total

    @property
    def saved_layer(self) -> float:
        """Bytes that the policy saves of one layer and microbatch."""
        m, a = self.model, self.a
        D, f = m.d_model, m.d_ff // self.width
        total = self.saved_attention(self.microbatch)
        if self.policy == "full":
            return total
        part = a * D * (self.X + self.assignments)  # arrived at the experts, come back from them
        if self.policy != "collectives":
            part += a * (2 * f * self.X + (2 * m.shared_d_ff + m.shared_gate) * self.T)
        total += self.parts * part
        if not self.on_tpu and self.parts > 1:  # what ordering tokens wait for
            again = 0 if self.width == 1 else self.sent
            total += (self.parts - 1) * a * D * (again + (self.sent_rows if self.policy == "none" else 0))
        return total

    @property
    def hidden(self) -> float:
        """Hidden states of all microbatches."""
        return self.a * self.model.d_model * self.layout.num_microbatches * self.microbatch

    @property
    def saved_dense(self) -> float:
        """Bytes that the policy saves of all leading dense layers, whose tokens the stages share."""
        m = self.model
        tokens = self.layout.num_microbatches * self.microbatch / self.layout.mesh.pipeline
        hidden = 0 if self.policy in ("full", "collectives") else self.a * 2 * m.dense_d_ff
        return m.num_dense_layers * (self.saved_attention(tokens) + hidden * tokens)

    @property
    def activations(self) -> float:
        """What the forward pass leaves for the backward pass."""
        return self.ticks * self.chunk * self.saved_layer + self.hidden + self.saved_dense

    @property
    def layer_gradients(self) -> float:
        """Gradients of this stage's layers, float32, dense ones as gathered where they are gathered once a step."""
        return _FLOAT32 * (self.W + (self.P if self.gather_step else self.P_stored))

    @property
    def copies(self) -> float:
        """Weights in another form than they are stored in, for the whole step.

        A GPU's compiler gathers dense weights in float32 and casts them, and experts', layer by layer. A TPU's casts
        all of the stage's weights before the loops.
        """
        dense = self.layers * self.P if self.gather_step else 0
        return self.a * (dense + self.layers * self.W) if self.on_tpu else _FLOAT32 * dense

    @property
    def table_gradients(self) -> float:
        """Of the vocabulary, float32: on a GPU as gathered, for both ends of the model where a loop sums them up."""
        if self.on_tpu:
            return _FLOAT32 * self.table / self.layout.mesh.expert
        return (1 if self.layout.num_microbatches == 1 else 2) * _FLOAT32 * self.table

    @property
    def accumulated(self) -> float:
        """Gradients of the slices before, as they are stored, float32."""
        return _FLOAT32 * self.stored if self.layout.grad_accumulation_steps > 1 else 0.0

    @property
    def logits(self) -> float:
        """Of one microbatch, float32."""
        return _FLOAT32 * self.sequences * self.layout.seq_len * self.vocab


def _matrices(projections: list[tuple[int, int]]) -> int:
    """Elements of the matrices."""
    return sum(inputs * outputs for inputs, outputs in projections)


def _projected(m: ModelConfig, tensor: int) -> int:
    """Elements of projections and of the kernel's results, for each token that lies on a device between blocks.

    For each of them a device has `tensor` tokens of its own heads, and of all latents.
    """
    *inward, _ = m.attention.projections(m.d_model, tensor)
    results = m.attention.num_heads // tensor * m.attention.head_dim
    return tensor * (sum(outputs for _, outputs in inward) + results)


def _vectors_of_heads(attention: AttentionConfig, tensor: int) -> int:
    """Elements of a device's biases of queries, keys and values, and of the scales of their norms."""
    queries, keys = attention.num_heads // tensor, attention.num_kv_heads // tensor
    scales = {"none": 0, "head": 2, "projection": queries + keys}[attention.qk_norm]
    return (attention.bias * (queries + 2 * keys) + scales) * attention.head_dim


def _backward(s: Sizes) -> Memory:
    m, a = s.model, s.a
    ticks_add_up = s.ticks > 1  # otherwise nothing is cut out of stacks, and no sum goes from tick to tick
    gradients: float = s.layers * s.layer_gradients + s.table_gradients + s.accumulated
    slices: float = s.W * (a if s.on_tpu else _FLOAT32)  # the layer's experts
    if ticks_add_up:
        gradients += s.chunk * s.layer_gradients
        slices += s.chunk * s.saved_layer
    if s.layout.pipeline_repeats > 1:  # the chunk's weights
        slices += s.chunk * s.layer_gradients
    rows, experts = _dispatch_backward(s)
    heads = a * s.A * m.attention.heads_dim // s.layout.mesh.tensor
    attention = heads * (1 if s.policy == "full" else s.parts) + a * m.d_model * (s.A * (1 + s.parts) + 6 * s.T)
    # Without a loop over microbatches the schedule puts off the output table's gradient until after the layers.
    logits = (1 if s.on_tpu else 2) * s.logits if s.layout.num_microbatches == 1 else 0.0
    # Of two slices the second is no loop, and XLA runs both forward passes first; of more, one is held at a time.
    held = 2 if s.layout.grad_accumulation_steps == 2 else 1
    return Memory(
        "backward", **s.state, gradients=gradients, compute_copies=s.copies,
        activations=held * s.activations + a * m.d_model * s.microbatch, dispatch_buffers=rows,
        workspace=s.P * a + experts + attention, logits=held * logits, kv_cache=0.0, temporaries=slices,
    )  # fmt: skip


def _dispatch_backward(s: Sizes) -> tuple[float, float]:
    """Rows of buffers; and of the experts casts, gradients and hidden rows, in the backward pass of a layer's dispatch.

    The larger of two moments: in a further round, computed again, while float32 gradients of the first round and of
    the part before wait; or earlier, in the first round of two parts, where rows are many for the size of the experts.
    """
    m, a = s.model, s.a
    row, hidden = a * m.d_model * s.X, a * m.d_ff // s.width * s.X
    parts = min(s.parts, 2)
    waiting = s.W * _FLOAT32 * parts
    if s.on_tpu:
        combine = 2 * _FLOAT32 * s.assignments * m.d_model  # gradients of the rows that tokens are summed from
        return max((4 * row + combine, waiting + 2 * hidden), (6 * row, waiting + 4 * hidden), key=sum)
    further = 2 * row, s.W * a + waiting + 7 * hidden
    first_rows = (4 if s.policy == "full" else 2) * parts * row
    first = first_rows, s.W * a + (2 * parts + (3 if s.policy in ("none", "minimal") else 5)) * hidden
    return max(further, first, key=sum)


def _loss(s: Sizes) -> Memory:
    saved = s.layout.num_microbatches if s.policy == "none" else 0
    return Memory(
        "loss", **s.state, gradients=_FLOAT32 * s.table + s.accumulated,
        compute_copies=s.copies + (_FLOAT32 + s.a) * s.table,
        activations=s.activations + 3 * s.hidden, dispatch_buffers=0.0, workspace=0.0, logits=(saved + 2) * s.logits,
        kv_cache=0.0, temporaries=0.0,
    )  # fmt: skip


def _update(s: Sizes) -> Memory:
    gradients = _FLOAT32 * s.stored
    return Memory(
        "update", **s.state, gradients=gradients, compute_copies=0.0, activations=0.0, dispatch_buffers=0.0,
        workspace=gradients, logits=0.0, kv_cache=0.0, temporaries=0.0,
    )  # fmt: skip


def _serve(model: ModelConfig, layout: Layout, mode: Mode) -> Memory:
    """Inference without a serving step to compile yet: weights in the compute dtype, the dense ones whole on each
    device of `expert`; keys and values of every sequence; one layer's insides.
    """
    if mode not in ("prefill", "decode"):
        raise ConfigError(f"mode={mode!r} must be train, prefill or decode")
    m, mesh = model, layout.mesh
    s = Sizes(model, layout.replace(seq_len=mesh.tensor) if mode == "decode" else layout)
    parameters = s.layers * (s.P + s.W) + m.num_dense_layers * s.dense_layer + 2 * s.table
    sequences = layout.batch_size // layout.batch_shards
    length = layout.seq_len + (mode == "decode")
    kv_layers = s.layers + m.num_dense_layers / mesh.pipeline
    kv_cache = kv_layers * sequences * length * m.attention.cache_dim(mesh.tensor)
    D, f = m.d_model, m.d_ff // s.width
    heads = m.attention.heads_dim // mesh.tensor
    return Memory(
        "serve", parameters=s.a * parameters, optimizer=0.0, batch=4.0 * s.batch_tokens, gradients=0.0,
        compute_copies=0.0, activations=s.a * 2 * s.layout.num_microbatches * s.microbatch * D,
        dispatch_buffers=s.a * D * (s.sent_rows + s.X) * s.parts,
        workspace=s.a * s.parts * (3 * f * s.X + s.A * (heads + D)), logits=4.0 * sequences * s.vocab,
        kv_cache=s.a * kv_cache, temporaries=0.0,
    )  # fmt: skip
