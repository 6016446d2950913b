"""Rematerialisation by named policy: what the backward pass finds saved and what it computes again.

| policy        | saved besides each layer's input                    | computed again                               |
|---------------|-----------------------------------------------------|----------------------------------------------|
| `none`        | everything but the weights' compute copies          | casts and slices of weights, their gathers   |
| `minimal`     | matrix products and what crossed the network        | norms, activations, attention scores, routing|
| `collectives` | what crossed the network, so none of it is repeated | everything else                              |
| `full`        | nothing                                             | the layer                                    |

Weights are never saved by a policy: they are constants of the pipeline's loop, and a copy a tick would be kept.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

from moejax.mesh import EXPERT

LAYER_INPUT = "layer_input"
NETWORK = "network"
MATMUL = "matmul"
ATTENTION_OUT = "attention_out"  # the name that `moejax.kernels.attention` gives its result

F = TypeVar("F", bound=Callable[..., Any])

_NAMES = {
    "minimal": (LAYER_INPUT, NETWORK, MATMUL, ATTENTION_OUT),
    "collectives": (LAYER_INPUT, NETWORK),
    "full": (LAYER_INPUT,),
}
_WEIGHT_PATH = ("dynamic_slice", "squeeze", "convert_element_type")


def _all_but_weights(primitive: Any, *_: Any, **params: Any) -> bool:
    gathers_weights = primitive.name == "all_gather" and EXPERT in params["axis_name"]
    return not gathers_weights and primitive.name not in _WEIGHT_PATH


def checkpoint(function: F, policy: str) -> F:
    """`jax.checkpoint(function)` under the policy of that name."""
    names = _NAMES.get(policy)
    rule = jax.checkpoint_policies.save_only_these_names(*names) if names else _all_but_weights
    return jax.checkpoint(function, policy=rule)


def layerwise(function: F, policy: str) -> F:
    """Checkpoints one layer inside a checkpointed stage, so that its backward pass holds one layer's insides."""
    return function if policy == "none" else checkpoint(function, policy)


def named(x: jax.Array, name: str) -> jax.Array:
    """Marks `x` as something that a policy may keep."""
    return checkpoint_name(x, name)
