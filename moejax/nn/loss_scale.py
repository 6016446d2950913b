"""The loss scale of float16 (arXiv 1710.03740), inside the program: whoever differentiates it gets true gradients.

In a mean over N tokens, each token's gradient is divided by N, and float16 rounds numbers below 6e-8 to zero. So the
gradient is multiplied by a power of two where the loss is formed, and divided by it where it reaches the float32
parameters. With a factor of about N, activations have the gradients of single tokens. The gradient of a weight is a sum
over tokens; it overflows float16 only where that of the mean is above 65,504 / `LARGEST`, which is 8.
"""

from functools import partial

import jax

LARGEST = 2**13


def loss_scale(dtype: str, num_tokens: int) -> float:
    """Returns the factor for a program that computes in `dtype` with a batch of `num_tokens`; 1 but for float16."""
    return float(min(2 ** (num_tokens.bit_length() - 1), LARGEST)) if dtype == "float16" else 1.0


def scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    """Returns `x`; its gradient is multiplied by `factor`."""
    return x if factor == 1 else _scale_gradient(x, factor)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_gradient(x: jax.Array, factor: float) -> jax.Array:
    return x


_scale_gradient.defvjp(lambda x, factor: (x, None), lambda factor, _, d_x: (d_x * factor,))
