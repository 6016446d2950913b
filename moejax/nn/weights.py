"""Weights on their way into a layer's mathematics."""

import jax

from moejax.kernels.manual import vary, varying


def weight(w: jax.Array, beside: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """The compute copy of a weight, in `dtype` or else that of `beside`, which it meets in an operation.

    It varies over the mesh axes that `beside` varies over. The sum of its gradient over those axes, which autodiff
    would put wherever the two first meet, then stands in the phase `gather`, with what else weights cost.
    """
    with jax.named_scope("gather"):
        return vary(w.astype(dtype or beside.dtype), varying(beside))
