"""Causal grouped-query attention inside segments."""

from moejax.kernels.attention.api import Implementation, attention, attention_implementation

__all__ = ["Implementation", "attention", "attention_implementation"]
