"""Shapes of language models beyond what moejax trains: enough of each to count parameters, FLOPs and bytes exactly.

    model = Architecture.from_config(mixtral_8x7b())  # or models.find_architecture("Qwen3-30B-A3B")
    model.parameters, model.active_parameters, model.flops_per_token(4096)

A model is a stack of `Layer`s: a mixer of tokens (attention of some kind, or a state-space model) and a feed-forward
layer (dense or experts), either of them absent where a hybrid has one in a layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moejax.config import ModelConfig, QkNorm


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention with grouped keys and values.

    `window` tokens are seen by a query, 0 for all. `qk_norm` is that of `moejax.config.AttentionConfig`. `sinks` adds a
    learned score a head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    qk_norm: QkNorm = "none"
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False

    @property
    def q_dim(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def score_dim(self) -> int:
        return self.head_dim

    @property
    def value_dim(self) -> int:
        return self.head_dim

    @property
    def cache_dim(self) -> int:
        """Elements that a token leaves in the KV cache."""
        return 2 * self.kv_dim

    def projections(self, d_model: int) -> list[tuple[int, int]]:
        """(inputs, outputs) of the matrices that every token passes, the output projection last."""
        return [(d_model, self.q_dim + 2 * self.kv_dim), (self.q_dim, d_model)]

    def other_parameters(self, d_model: int) -> int:
        norms = {"none": 0, "head": 2 * self.head_dim, "projection": self.q_dim + self.kv_dim}[self.qk_norm]
        biases = self.qkv_bias * (self.q_dim + 2 * self.kv_dim) + self.out_bias * d_model
        return norms + biases + self.sinks * self.num_heads


@dataclasses.dataclass(frozen=True)
class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values from one latent of a token.

    `q_rank` 0 projects queries directly. Heads score over `nope_dim + rope_dim` and carry values of `value_dim`.
    """

    num_heads: int
    q_rank: int
    kv_rank: int
    nope_dim: int = 128
    rope_dim: int = 64
    value_dim: int = 128
    window: int = 0

    @property
    def q_dim(self) -> int:
        return self.num_heads * self.score_dim

    @property
    def kv_dim(self) -> int:
        return self.num_heads * self.score_dim  # after expansion, as training has them

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads

    @property
    def score_dim(self) -> int:
        return self.nope_dim + self.rope_dim

    @property
    def cache_dim(self) -> int:
        return self.kv_rank + self.rope_dim

    def projections(self, d_model: int) -> list[tuple[int, int]]:
        queries = [(d_model, self.q_rank), (self.q_rank, self.q_dim)] if self.q_rank else [(d_model, self.q_dim)]
        return [
            *queries,
            (d_model, self.kv_rank + self.rope_dim),
            (self.kv_rank, self.num_heads * (self.nope_dim + self.value_dim)),
            (self.num_heads * self.value_dim, d_model),
        ]

    def other_parameters(self, d_model: int) -> int:
        return self.q_rank + self.kv_rank  # their norms


@dataclasses.dataclass(frozen=True)
class StateSpace:
    """Mamba-2 (arXiv 2405.21060): `num_heads` heads of `head_dim` with a state of `state` each."""

    num_heads: int
    head_dim: int
    state: int
    groups: int
    conv: int = 4
    chunk: int = 128

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    def projections(self, d_model: int) -> list[tuple[int, int]]:
        return [(d_model, 2 * self.inner + 2 * self.groups * self.state + self.num_heads), (self.inner, d_model)]

    def other_parameters(self, d_model: int) -> int:
        channels = self.inner + 2 * self.groups * self.state
        return channels * (self.conv + 1) + 3 * self.num_heads + self.inner  # convolution, A, D, dt, the gated norm


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """A dense layer; `gated` has three matrices (SwiGLU), otherwise two."""

    d_ff: int
    gated: bool = True
    bias: bool = False

    def parameters(self, d_model: int) -> int:
        return (2 + self.gated) * d_model * self.d_ff + self.bias * ((1 + self.gated) * self.d_ff + d_model)


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture: every token visits `per_token` of `num` experts, and a shared one of width `shared_d_ff` if any.

    With `latent`, the routed experts work on tokens projected to that width.
    """

    num: int
    per_token: int
    d_ff: int
    gated: bool = True
    shared_d_ff: int = 0
    shared_gate: bool = False
    latent: int = 0
    bias: bool = False
    router_bias: bool = False

    def width(self, d_model: int) -> int:
        """Elements of a token that travels to a routed expert."""
        return self.latent or d_model

    def expert_parameters(self, d_model: int) -> int:
        """Of one routed expert."""
        return FeedForward(self.d_ff, self.gated, self.bias).parameters(self.width(d_model))

    def always_parameters(self, d_model: int) -> int:
        """Of what every token passes: router, latent projections, shared expert with its gate."""
        shared = FeedForward(self.shared_d_ff, self.gated).parameters(d_model)
        return (d_model + self.router_bias) * self.num + d_model * (2 * self.latent + self.shared_gate) + shared


Mixer = Attention | LatentAttention | StateSpace


@dataclasses.dataclass(frozen=True)
class Layer:
    mixer: Mixer | None
    ffn: FeedForward | Experts | None

    def norm_parameters(self, d_model: int, layer_norm: bool) -> int:
        return ((self.mixer is not None) + (self.ffn is not None)) * d_model * (1 + layer_norm)

    def always_parameters(self, d_model: int, layer_norm: bool = False) -> int:
        """Parameters that every token uses."""
        total = self.norm_parameters(d_model, layer_norm)
        if self.mixer is not None:
            total += sum(a * b for a, b in self.mixer.projections(d_model)) + self.mixer.other_parameters(d_model)
        if isinstance(self.ffn, FeedForward):
            total += self.ffn.parameters(d_model)
        elif self.ffn is not None:
            total += self.ffn.always_parameters(d_model)
        return total

    def expert_parameters(self, d_model: int) -> int:
        """Parameters of all routed experts together."""
        return self.ffn.num * self.ffn.expert_parameters(d_model) if isinstance(self.ffn, Experts) else 0


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A model: `layers` as (how many, which); `positions` are learned position embeddings (GPT-3), 0 for none.

    `predicted` tokens beyond the next have modules of their own in training (MTP, DeepSeek-V3), each as deep as one
    block and with logits of its own. They are left out of the published sizes, and so of all counts here.
    """

    name: str
    d_model: int
    vocab_size: int
    layers: tuple[tuple[int, Layer], ...]
    tie_embeddings: bool = False
    layer_norm: bool = False
    positions: int = 0
    predicted: int = 0

    @classmethod
    def from_config(cls, model: ModelConfig, name: str = "") -> Architecture:
        """The same for a model that moejax trains."""
        a, latent = model.attention, model.attention.latent
        attention: Attention | LatentAttention = Attention(
            a.num_heads, a.num_kv_heads, a.head_dim, qk_norm=a.qk_norm, qkv_bias=a.bias, out_bias=a.output_bias
        )
        if a.kind == "latent":
            fixed = a.head_dim - latent.rope_head_dim
            attention = LatentAttention(
                a.num_heads, latent.q_rank, latent.kv_rank, fixed, latent.rope_head_dim, latent.value_head_dim
            )
        experts = Experts(
            model.num_experts, model.experts_per_token, model.d_ff,
            shared_d_ff=model.shared_d_ff, shared_gate=model.shared_gate, router_bias=model.router.bias,
        )  # fmt: skip
        dense = ((model.num_dense_layers, Layer(attention, FeedForward(model.dense_d_ff))),)
        return cls(
            name,
            model.d_model,
            model.vocab_size,
            (dense if model.num_dense_layers else ()) + ((model.num_moe_layers, Layer(attention, experts)),),
            tie_embeddings=model.tie_embeddings,
        )

    def __iter__(self) -> Iterator[tuple[int, Layer]]:
        return iter(self.layers)

    @property
    def num_layers(self) -> int:
        return sum(count for count, _ in self.layers)

    @property
    def embedding_parameters(self) -> int:
        """Of the input table alone."""
        return (self.vocab_size + self.positions) * self.d_model

    @property
    def always_parameters(self) -> int:
        """All but those of routed experts."""
        layers = sum(count * layer.always_parameters(self.d_model, self.layer_norm) for count, layer in self)
        output = 0 if self.tie_embeddings else self.vocab_size * self.d_model
        return layers + self.embedding_parameters + output + self.d_model * (1 + self.layer_norm)

    @property
    def expert_parameters(self) -> int:
        return sum(count * layer.expert_parameters(self.d_model) for count, layer in self)

    @property
    def parameters(self) -> int:
        return self.always_parameters + self.expert_parameters

    @property
    def active_parameters(self) -> int:
        """Parameters that one token uses, both tables included."""
        routed = sum(
            count * layer.ffn.per_token * layer.ffn.expert_parameters(self.d_model)
            for count, layer in self
            if isinstance(layer.ffn, Experts)
        )
        return self.always_parameters + routed

    def flops_per_token(self, seq_len: int) -> float:
        """Matrix FLOPs of one token's forward pass, causal attention halved, mean over a sequence."""
        total = 2.0 * self.vocab_size * self.d_model
        for count, layer in self:
            weights = sum(a * b for a, b in layer.mixer.projections(self.d_model)) if layer.mixer else 0
            if isinstance(layer.ffn, FeedForward):
                weights += (2 + layer.ffn.gated) * self.d_model * layer.ffn.d_ff
            elif layer.ffn is not None:
                weights += layer.ffn.always_parameters(self.d_model)
                weights += layer.ffn.per_token * (2 + layer.ffn.gated) * layer.ffn.width(self.d_model) * layer.ffn.d_ff
            total += count * (2.0 * weights + mixing_flops(layer.mixer, seq_len))
        return total


def attended(mixer: Attention | LatentAttention, seq_len: float) -> float:
    """Tokens that a query sees, on average over a causal sequence."""
    window = mixer.window
    if not window or window >= seq_len:
        return seq_len / 2
    return window - window * window / (2 * seq_len)


def mixing_flops(mixer: Mixer | None, seq_len: float) -> float:
    """FLOPs of a token that no weight takes part in: scores and values, or the state's products."""
    if mixer is None:
        return 0.0
    if isinstance(mixer, StateSpace):  # inside a chunk: scores and values; between chunks: into the state and out of it
        inside = mixer.chunk * (mixer.groups * mixer.state + mixer.inner)
        return 2.0 * (inside + 2 * mixer.inner * mixer.state)
    return 2.0 * attended(mixer, seq_len) * mixer.num_heads * (mixer.score_dim + mixer.value_dim)
