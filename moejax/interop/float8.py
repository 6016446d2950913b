"""Weights in float8 with a factor per block, as DeepSeek-V3, MiniMax-M2 and the FP8 versions of Qwen3 are published.

    model.layers.0.mlp.experts.0.up_proj.weight            F8_E4M3 [2048, 7168]
    model.layers.0.mlp.experts.0.up_proj.weight_scale_inv  F32 [16, 56]

A weight is the stored number times its block's factor. Files call it the inverse scale: the quantizer multiplied by the
scale, then rounded. `weight_block_size` in config.json's `quantization_config` gives the shape of a block; blocks at
the end of a dimension may be smaller (DeepSeek-V3's report, arXiv 2412.19437, section 3.3.2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from moejax.checks import check
from moejax.interop.hf_config import HfConfig, shown
from moejax.interop.tensors import FLOAT8, BlockFactors, StoredTensor

SUFFIX = "_scale_inv"
Block = tuple[int, int]


def read_block(c: HfConfig) -> Block | None:
    """Returns the size of blocks of a config.json with weights in float8; None if it has plain weights.

    Raises:
      ConfigError: the weights are quantized in another way.
    """
    fields = c.value("quantization_config")
    if fields is None:
        return None
    check(
        isinstance(fields, dict) and fields.get("quant_method") == "fp8",
        f"{c.source} has quantization_config={shown(fields)}; of quantized weights, moejax reads only "
        'quant_method="fp8" with weight_block_size',
    )
    own = HfConfig(fields, c.source)
    own.require("quant_method", "fp8", "float8 alone")
    own.choice("fmt", of=("e4m3", "float8_e4m3fn"), default="e4m3")  # two names for the same thing
    own.require("expert_dtype", "fp8", "float8 in experts too")
    # Of activations, of transformers, and of tensors, whose dtypes say it themselves.
    for name in ("activation_scheme", "scale_fmt", "dequantize", "modules_to_convert", "modules_to_not_convert"):
        own.skip(name)
    block = own.numbers("weight_block_size")
    own.finish()
    check(
        len(block) == 2 and all(size >= 1 and size == int(size) for size in block),
        f"{c.source} has weight_block_size={shown(list(block))}; it must be two positive integers",
    )
    return int(block[0]), int(block[1])


def with_factors(tensors: Mapping[str, StoredTensor], block: Block | None) -> dict[str, StoredTensor]:
    """Returns the tensors, each one in float8 with its factors attached, which are removed as tensors of their own.

    Raises:
      ConfigError: a tensor in float8 has no factors, or not one per block.
    """
    found = dict(tensors)
    for name, tensor in tensors.items():
        if tensor.dtype != FLOAT8:
            continue
        check(block is not None, f"{tensor.file} has {name} in float8, and config.json has no quantization_config")
        assert block is not None
        factors = found.pop(name + SUFFIX, None)
        check(factors is not None, f"{tensor.file} has {name} in float8 without its factors, {name}{SUFFIX}")
        assert factors is not None
        check(
            len(tensor.shape) == 2,
            f"{tensor.file} has {name} in float8 as {list(tensor.shape)}; only matrices can be in blocks",
        )
        blocks = tuple(-(-size // of) for size, of in zip(tensor.shape, block, strict=True))
        check(
            factors.shape == blocks and factors.dtype in ("F32", "BF16"),
            f"{factors.file} has {name}{SUFFIX} as {factors.dtype}{list(factors.shape)}; {name}{list(tensor.shape)} in "
            f"blocks of {list(block)} needs F32{list(blocks)} or BF16",
        )
        found[name] = dataclasses.replace(tensor, factors=BlockFactors(factors, block))
    return found
