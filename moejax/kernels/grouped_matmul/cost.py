"""Sizes of the kernels' blocks on TPUs, known without importing them: for the backend and the planner alike."""

from __future__ import annotations

_TILE = 512  # rows, contracted elements and columns of a tile, at most: 3 MB of vector memory in bfloat16
_LANES = 128  # tiles are multiples of the width of a vector register


def tile(dim: int) -> int:
    """The tile of a dim of that size."""
    return min(_TILE, -(-dim // _LANES) * _LANES)


def padded_rows(platform: str, rows: int) -> int:
    """The rows that the kernels work on, on "gpu" or "tpu", when they are given so many."""
    return rows + -rows % tile(rows) if platform == "tpu" else rows
