"""Published models by name, each as its config.json has it.

    find_architecture("Qwen/Qwen3-30B-A3B-FP8").parameters

Names are matched tolerantly: case, punctuation, the organization and endings such as "-Instruct" or "-FP8" do not
matter; a shape written out ("GPT L32 h4096 GQA8 V131k") is read too.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any

from experiments.published_runs.architecture import (
    Architecture,
    Attention,
    Experts,
    FeedForward,
    LatentAttention,
    Layer,
    StateSpace,
)
from moejax.checks import ConfigError


def _gqa(
    name: str, layers: int, d_model: int, heads: int, kv: int, ffn: FeedForward | Experts, vocab: int, *,
    head_dim: int = 0, tie: bool = False, first: tuple[int, FeedForward] | None = None, **attention: Any,
) -> Architecture:  # fmt: skip
    mixer = Attention(heads, kv, head_dim or d_model // heads, **attention)
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


def _gpt(name: str, layers: int, d_model: int, heads: int) -> Architecture:
    """As Megatron-LM's papers scale GPT-3 (arXiv 2104.04473, table 1)."""
    mixer = Attention(heads, heads, d_model // heads, qkv_bias=True, out_bias=True)
    layer = Layer(mixer, FeedForward(4 * d_model, gated=False, bias=True))
    return Architecture(name, d_model, 51_200, ((layers, layer),), True, True, 2048)


def _llama4(name: str, experts: int, *, interleaved: bool) -> Architecture:
    """Text tower: one routed and one shared expert a token; Maverick's every other layer is dense."""
    mixer, moe = Attention(40, 8, 128), Experts(experts, 1, 8192, shared_d_ff=8192)
    dense = ((24, Layer(mixer, FeedForward(16_384))),) if interleaved else ()
    return Architecture(name, 5120, 202_048, (*dense, (48 - 24 * interleaved, Layer(mixer, moe))))


@functools.cache
def architectures() -> dict[str, Architecture]:
    """Published models by name; each is as its config.json has it."""
    swiglu = FeedForward
    qwen: dict[str, Any] = {"qk_norm": "head"}

    def shared(num: int, per_token: int, d_ff: int, shared_d_ff: int) -> Experts:
        return Experts(num, per_token, d_ff, shared_d_ff=shared_d_ff, router_bias=True)

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
        _gqa("olmoe-1b-7b", 16, 2048, 16, 16, Experts(64, 8, 1024), 50_304, qk_norm="projection"),
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
        _latent("moonlight-16b-a3b", 27, 2048, 16, 0, 1, 11_264, shared(64, 6, 1408, 2816), 163_840),
        _latent("deepseek-v3", 61, 7168, 128, 1536, 3, 18_432, shared(256, 8, 2048, 2048), 129_280),
        _latent("kimi-k2", 61, 7168, 64, 1536, 1, 18_432, shared(384, 8, 2048, 2048), 163_840),
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
        _gqa("nemotron-4-340b", 96, 18_432, 96, 8, swiglu(73_728, gated=False), 256_000),
        _gqa("qwen2.5-0.5b", 24, 896, 14, 2, swiglu(4864), 151_936, tie=True, qkv_bias=True),
        _gqa("qwen2.5-1.5b", 28, 1536, 12, 2, swiglu(8960), 151_936, tie=True, qkv_bias=True),
        _gqa("qwen2.5-3b", 36, 2048, 16, 2, swiglu(11_008), 151_936, tie=True, qkv_bias=True),
        _gqa("qwen3-coder-480b-a35b", 62, 6144, 96, 8, Experts(160, 8, 2560), 151_936, head_dim=128, **qwen),
        _gqa("phi-3.5-moe", 32, 4096, 32, 8, Experts(16, 2, 6400), 32_064, qkv_bias=True, out_bias=True),
        _gqa(
            "glm-4.5-air", 46, 4096, 96, 8, shared(128, 8, 1408, 1408), 151_552, head_dim=128, qkv_bias=True,
            first=(1, swiglu(10_944)),
        ),
        _gqa(
            "glm-4.5", 92, 5120, 96, 8, shared(160, 8, 1536, 1536), 151_552, head_dim=128, qkv_bias=True,
            first=(3, swiglu(12_288)), **qwen,
        ),
        _gqa(
            "deepseek-moe-16b", 28, 2048, 16, 16, Experts(64, 6, 1408, shared_d_ff=2816), 102_400,
            first=(1, swiglu(10_944)),
        ),
        _latent("deepseek-v2", 60, 5120, 128, 1536, 1, 12_288, Experts(160, 6, 1536, shared_d_ff=3072), 102_400),
        _gpt("gpt-22b", 48, 6144, 64),
        _gpt("gpt-530b", 105, 20_480, 128),
        _gpt("gpt-1t", 128, 25_600, 160),
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


def what_is_missing(model: Architecture) -> list[str]:
    """Names the parts of a model that moejax has no layer for, so that it can neither train nor plan it."""
    layers = [layer for _, layer in model]
    mixers = [layer.mixer for layer in layers]
    attention = [mixer for mixer in mixers if isinstance(mixer, Attention)]
    experts = [layer.ffn for layer in layers if isinstance(layer.ffn, Experts)]
    ffns = [layer.ffn for layer in layers if layer.ffn is not None]
    missing = {
        "state-space layers (Mamba)": any(isinstance(mixer, StateSpace) for mixer in mixers),
        "sliding-window attention": any(mixer.window for mixer in attention),
        "attention sinks": any(mixer.sinks for mixer in attention),
        "biases of feed-forward layers": any(ffn.bias for ffn in ffns),
        "models without experts": not experts,
        "feed-forward layers without a gate": any(not ffn.gated for ffn in ffns),
        "experts on a projection of the token": any(ffn.latent for ffn in experts),
        "LayerNorm": model.layer_norm,
        "learned positions": model.positions > 0,
    }
    return [name for name, applies in missing.items() if applies]


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
