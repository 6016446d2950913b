"""What the attention kernels cost, known without importing them: for planner and profiler alike.

A kernel multiplies queries by tokens so many times; a product takes 2 FLOPs, and half of them are behind the causal
mask, where kernels skip whole blocks.

Dims: S sequence, H head_dim.
"""

from __future__ import annotations

import math
import re

# By a kernel's name on GPU and TPU: products of queries by tokens. The backward pass makes the scores again, on TPU in
# each of its two kernels.
PRODUCTS = {
    "mha_forward": 2,
    "mha_backward": 5,
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
}

_BLOCK = 128  # tokens of a GPU kernel's forward block, at most
_BLOCK_BYTES = 32 * 1024  # of queries, keys or values; five such blocks are in shared memory, 163 KB on an A100
BLOCK_BACKWARD = 32  # tokens of a backward block, the kernel's default
SMALLEST = 16  # rows and columns of the smallest matrix product that Triton has
_LANES = 128  # a TPU kernel's block is a multiple of the width of a vector register


def gpu_block(S: int, H: int, itemsize: int) -> int:
    """Tokens of a forward block, a power of two as everything in Triton; a short row is one block."""
    whole_row = max(SMALLEST, 1 << (S - 1).bit_length())
    fits = _BLOCK_BYTES // (itemsize << (H - 1).bit_length())
    return min(whole_row, _BLOCK, max(BLOCK_BACKWARD, fits))


def padded(platform: str, S: int, H: int, itemsize: int) -> tuple[int, int]:
    """The sequence and the head_dim that the kernel works on, on "gpu" or "tpu"."""
    if platform == "tpu":
        return S + -S % _LANES, H
    return S + -S % gpu_block(S, H, itemsize), max(SMALLEST, H)


def products(name: str) -> int:
    """Products of queries by tokens in the kernel of that name; 0 in what is none of them."""
    return next((number for known, number in PRODUCTS.items() if known in name), 0)


def custom_call_flops(attributes: str, seq_len: int) -> float:
    """FLOPs of a compiled kernel's custom call on `seq_len` tokens, from the text of its attributes; 0 for others."""
    operands = re.search(r"operand_layout_constraints=\{(.*?\})\}", attributes)
    if not (products(attributes) and operands):
        return 0
    queries = max(math.prod(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", operands[1]))
    return products(attributes) * queries * seq_len
