"""Weights on their way into a layer's mathematics."""

import jax

from moejax.kernels.manual import vary, varying


def compute_copy(w: jax.Array, like: jax.Array, dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """Returns the weight as an operation with `like` needs it: in `dtype`, or else in that of `like`.

    The copy varies over the mesh axes that `like` varies over. Autodiff sums its gradient over those axes, and without
    this cast would do so wherever the two first meet; here the sum counts to the phase `gather`, as all weights' costs.
    """
    with jax.named_scope("gather"):
        return vary(w.astype(dtype or like.dtype), varying(like))
