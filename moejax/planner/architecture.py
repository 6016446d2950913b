"""Shapes of language models beyond what moejax trains: enough of each to count parameters, FLOPs and bytes exactly.

    model = find_architecture("Qwen/Qwen3-30B-A3B-FP8")
    model.parameters, model.active_parameters, model.flops_per_token(4096)

A model is a stack of `Layer`s: a mixer of tokens (attention of some kind, or a state-space model), a feed-forward
layer (dense or experts), either of them absent where a hybrid has one in a layer. Names are matched tolerantly: case,
punctuation, the organisation and endings such as "-Instruct" or "-FP8" do not matter; a shape written out ("GPT L32
h4096 GQA8 V131k") is read too.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator

from moejax.config import ConfigError, ModelConfig


@dataclasses.dataclass(frozen=True)
class Attention:
    """Softmax attention with grouped keys and values.

    `window` tokens are seen by a query, 0 for all. `qk_norm` normalises queries and keys: "head" shares a scale of
    `head_dim` between heads, "full" has one for each element, "" does not. `sinks` adds a learned score a head.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0
    qk_norm: str = ""
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
        norms = {"": 0, "head": 2 * self.head_dim, "full": self.q_dim + self.kv_dim}[self.qk_norm]
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
        """Of what every token passes: router, latent projections, shared expert."""
        shared = FeedForward(self.shared_d_ff, self.gated).parameters(d_model)
        return (d_model + self.router_bias) * self.num + 2 * d_model * self.latent + shared


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
        attention = Attention(model.num_heads, model.num_kv_heads, model.head_dim)
        experts = Experts(
            model.num_experts, model.experts_per_token, model.d_ff,
            shared_d_ff=model.shared_d_ff, router_bias=model.router_bias,
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


def _gqa(
    name: str, layers: int, d_model: int, heads: int, kv: int, ffn: FeedForward | Experts, vocab: int, *,
    head_dim: int = 0, tie: bool = False, first: tuple[int, FeedForward] | None = None, **attention: object,
) -> Architecture:  # fmt: skip
    mixer = Attention(heads, kv, head_dim or d_model // heads, **attention)  # type: ignore[arg-type]
    dense = ((first[0], Layer(mixer, first[1])),) if first else ()
    rest = layers - (first[0] if first else 0)
    return Architecture(name, d_model, vocab, (*dense, (rest, Layer(mixer, ffn))), tie_embeddings=tie)


def _latent(
    name: str, layers: int, d_model: int, heads: int, q_rank: int, dense: int, dense_d_ff: int, experts: Experts,
    vocab: int,
) -> Architecture:  # fmt: skip
    mixer = LatentAttention(heads, q_rank, 512)
    stack = ((dense, Layer(mixer, FeedForward(dense_d_ff))), (layers - dense, Layer(mixer, experts)))
    return Architecture(name, d_model, vocab, stack, predicted=int(name == "deepseek-v3"))


def _gpt_oss(name: str, layers: int, experts: int) -> Architecture:
    """arXiv 2508.10925: every other layer sees 128 tokens; biases everywhere; a sink a head."""
    full = Attention(64, 8, 64, qkv_bias=True, out_bias=True, sinks=True)
    ffn = Experts(experts, 4, 2880, bias=True, router_bias=True)
    stack = ((layers // 2, Layer(dataclasses.replace(full, window=128), ffn)), (layers // 2, Layer(full, ffn)))
    return Architecture(name, 2880, 201_088, stack)


def _nemotron(
    name: str, d_model: int, pattern: tuple[int, int, int], mamba_heads: int, experts: Experts
) -> Architecture:
    """A hybrid of `pattern` (state-space, experts, attention) layers; squared ReLU, no gate."""
    stack = (
        (pattern[0], Layer(StateSpace(mamba_heads, 64, 128, 8), None)),
        (pattern[1], Layer(None, experts)),
        (pattern[2], Layer(Attention(32, 2, 128), None)),
    )
    return Architecture(name, d_model, 131_072, stack, predicted=2 if "super" in name else 0)


def _gemma3_12b() -> Architecture:
    local = Attention(16, 8, 256, window=1024, qk_norm="head")
    ffn = FeedForward(15_360)
    stack = ((40, Layer(local, ffn)), (8, Layer(dataclasses.replace(local, window=0), ffn)))
    return Architecture("gemma-3-12b", 3840, 262_208, stack, tie_embeddings=True)


def _gpt3() -> Architecture:
    layer = Layer(Attention(96, 96, 128, qkv_bias=True, out_bias=True), FeedForward(49_152, gated=False, bias=True))
    return Architecture("gpt3-175b", 12_288, 50_257, ((96, layer),), True, True, 2048)


def _llama4(name: str, experts: int, *, interleaved: bool) -> Architecture:
    """Text tower: one routed and one shared expert a token; Maverick's every other layer is dense."""
    mixer, moe = Attention(40, 8, 128), Experts(experts, 1, 8192, shared_d_ff=8192)
    dense = ((24, Layer(mixer, FeedForward(16_384))),) if interleaved else ()
    return Architecture(name, 5120, 202_048, (*dense, (48 - 24 * interleaved, Layer(mixer, moe))))


@functools.cache
def architectures() -> dict[str, Architecture]:
    """Published models by name; each is as its config.json has it."""
    swiglu, qwen = FeedForward, {"qk_norm": "head"}
    found = [
        _gqa("llama-2-7b", 32, 4096, 32, 32, swiglu(11_008), 32_000),
        _gqa("llama-2-13b", 40, 5120, 40, 40, swiglu(13_824), 32_000),
        _gqa("llama-2-70b", 80, 8192, 64, 8, swiglu(28_672), 32_000),
        _gqa("llama-3.1-8b", 32, 4096, 32, 8, swiglu(14_336), 128_256),
        _gqa("llama-3.1-70b", 80, 8192, 64, 8, swiglu(28_672), 128_256),
        _gqa("llama-3.1-405b", 126, 16_384, 128, 8, swiglu(53_248), 128_256),
        _gqa("llama-3.2-1b", 16, 2048, 32, 8, swiglu(8192), 128_256, tie=True),
        _gqa("llama-3.2-3b", 28, 3072, 24, 8, swiglu(8192), 128_256, tie=True),
        _gqa("mistral-7b", 32, 4096, 32, 8, swiglu(14_336), 32_000),
        _gqa("mixtral-8x7b", 32, 4096, 32, 8, Experts(8, 2, 14_336), 32_000),
        _gqa("mixtral-8x22b", 56, 6144, 48, 8, Experts(8, 2, 16_384), 32_768),
        _gqa("dbrx-132b", 40, 6144, 48, 8, Experts(16, 4, 10_752), 100_352),
        _gqa("olmoe-1b-7b", 16, 2048, 16, 16, Experts(64, 8, 1024), 50_304, qk_norm="full"),
        _gqa("qwen2.5-7b", 28, 3584, 28, 4, swiglu(18_944), 152_064, qkv_bias=True),
        _gqa("qwen2.5-14b", 48, 5120, 40, 8, swiglu(13_824), 152_064, qkv_bias=True),
        _gqa("qwen2.5-32b", 64, 5120, 40, 8, swiglu(27_648), 152_064, qkv_bias=True),
        _gqa("qwen2.5-72b", 80, 8192, 64, 8, swiglu(29_568), 152_064, qkv_bias=True),
        _gqa("qwen3-0.6b", 28, 1024, 16, 8, swiglu(3072), 151_936, head_dim=128, tie=True, **qwen),
        _gqa("qwen3-1.7b", 28, 2048, 16, 8, swiglu(6144), 151_936, head_dim=128, tie=True, **qwen),
        _gqa("qwen3-4b", 36, 2560, 32, 8, swiglu(9728), 151_936, head_dim=128, tie=True, **qwen),
        _gqa("qwen3-8b", 36, 4096, 32, 8, swiglu(12_288), 151_936, **qwen),
        _gqa("qwen3-14b", 40, 5120, 40, 8, swiglu(17_408), 151_936, **qwen),
        _gqa("qwen3-32b", 64, 5120, 64, 8, swiglu(25_600), 151_936, head_dim=128, **qwen),
        _gqa("qwen3-30b-a3b", 48, 2048, 32, 4, Experts(128, 8, 768), 151_936, head_dim=128, **qwen),
        _gqa("qwen3-235b-a22b", 94, 4096, 64, 4, Experts(128, 8, 1536), 151_936, head_dim=128, **qwen),
        _gqa("minimax-m2", 62, 3072, 48, 8, Experts(256, 8, 1536, router_bias=True), 200_064, head_dim=128, **qwen),
        _latent("deepseek-v2-lite", 27, 2048, 16, 0, 1, 10_944, Experts(64, 6, 1408, shared_d_ff=2816), 102_400),
        _latent("moonlight-16b-a3b", 27, 2048, 16, 0, 1, 11_264, Experts(64, 6, 1408, shared_d_ff=2816), 163_840),
        _latent("deepseek-v3", 61, 7168, 128, 1536, 3, 18_432, Experts(256, 8, 2048, shared_d_ff=2048), 129_280),
        _latent("kimi-k2", 61, 7168, 64, 1536, 1, 18_432, Experts(384, 8, 2048, shared_d_ff=2048), 163_840),
        _gpt_oss("gpt-oss-20b", 24, 32),
        _gpt_oss("gpt-oss-120b", 36, 128),
        _llama4("llama-4-scout", 16, interleaved=False),
        _llama4("llama-4-maverick", 128, interleaved=True),
        _nemotron(
            "nemotron-3-super-120b-a12b", 4096, (40, 40, 8), 128,
            Experts(512, 22, 2688, gated=False, shared_d_ff=5376, latent=1024, router_bias=True),
        ),
        _nemotron(
            "nemotron-3-nano-30b-a3b", 2688, (23, 23, 6), 64,
            Experts(128, 6, 1856, gated=False, shared_d_ff=3712, router_bias=True),
        ),
        _gqa("nemotron-4-15b", 32, 6144, 48, 8, swiglu(24_576, gated=False), 256_000),
        _gemma3_12b(),
        _gpt3(),
    ]  # fmt: skip
    return {model.name: model for model in found}


_ALIASES = {
    "llama27b": "llama-2-7b", "llama38b": "llama-3.1-8b", "llama370b": "llama-3.1-70b", "llama3405b": "llama-3.1-405b",
    "llama3370b": "llama-3.1-70b", "llama3170b": "llama-3.1-70b",
    "deepseekr1": "deepseek-v3", "deepseekv31": "deepseek-v3", "deepseekv3671b": "deepseek-v3",
    "deepseek3671b": "deepseek-v3", "deepseek3": "deepseek-v3", "kimik25": "kimi-k2", "kimik2": "kimi-k2",
    "minimaxm25": "minimax-m2", "moonlight": "moonlight-16b-a3b", "gpt3": "gpt3-175b", "gpt175b": "gpt3-175b",
    "olmoe": "olmoe-1b-7b", "dbrx": "dbrx-132b", "gemma312b": "gemma-3-12b", "nemotron415b": "nemotron-4-15b",
    "nemotron3super": "nemotron-3-super-120b-a12b", "nemotron3nano": "nemotron-3-nano-30b-a3b",
    "mixtral87b": "mixtral-8x7b", "mixtral822b": "mixtral-8x22b", "qwen330b": "qwen3-30b-a3b",
    "qwen3235b": "qwen3-235b-a22b", "qwen330ba3b": "qwen3-30b-a3b", "llama4scout17b16e": "llama-4-scout",
    "llama4maverick17b128e": "llama-4-maverick",
}  # fmt: skip
_ENDINGS = re.compile(r"(instruct|base|chat|fp8|nvfp4|mxfp4|bf16|hf|thinking|it|meta|nvidia|v01|v03|dropless|\d{4})+$")


def _plain(name: str) -> str:
    text = re.sub(r"\(.*?\)", "", name).split("/")[-1].lower()
    return re.sub(r"^(meta|nvidia)", "", re.sub(r"[^a-z0-9]", "", text))


def find_architecture(name: str) -> Architecture:
    """The model of that name, or of the shape that it spells out.

    Raises:
      ConfigError: it is neither.
    """
    known = {_plain(key): key for key in architectures()} | _ALIASES
    plain = _plain(name)
    for candidate in (plain, _ENDINGS.sub("", plain)):
        if candidate in known:
            return architectures()[known[candidate]]
    shape = _spelled_out(name)
    if shape is not None:
        return shape
    prefixes = [key for key in known if plain.startswith(key) and not plain[len(key) : len(key) + 1].isdigit()]
    if prefixes:
        return architectures()[known[max(prefixes, key=len)]]
    raise ConfigError(f"model={name!r} has no preset; use one of {', '.join(sorted(architectures()))}")


def _number(text: str, pattern: str) -> int | None:
    found = re.search(rf"(?<![a-z0-9]){pattern}\s*=?\s*(\d+)(k?)(?![a-z0-9])", text)
    return int(found[1]) * (1024 if found[2] else 1) if found else None


def _spelled_out(name: str) -> Architecture | None:
    """Reads "GPT L32 h4096 [a32] [GQA8] [f16384] [V131k] [swiglu] [E64 top8]"; None without layers and width.

    What is left out is as in Megatron-LM: heads of 128, no GQA, a plain feed-forward layer 4 × as wide, LayerNorm.
    """
    text = name.lower()
    layers, d_model = _number(text, "l"), _number(text, "h")
    if not layers or not d_model:
        return None
    heads = _number(text, "a") or d_model // 128
    gated = "swiglu" in text
    d_ff = _number(text, "(?:f|ffn)") or 4 * d_model
    experts = _number(text, "e")
    ffn = Experts(experts, _number(text, "top") or 2, d_ff, gated) if experts else FeedForward(d_ff, gated, not gated)
    mixer = Attention(
        heads, _number(text, "(?:gqa|kv)") or heads, d_model // heads, qkv_bias=not gated, out_bias=not gated
    )
    return Architecture(name, d_model, _number(text, "v") or 51_200, ((layers, Layer(mixer, ffn)),), False, not gated)
