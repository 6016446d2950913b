"""Rows sorted by group, each group times its own matrix."""

from moejax.kernels.grouped_matmul.api import Implementation, Pass, grouped_matmul, grouped_matmul_implementation

__all__ = ["Implementation", "Pass", "grouped_matmul", "grouped_matmul_implementation"]
