"""Rematerialization by named policy: what the backward pass finds saved and what it computes again.

| policy        | saved besides each layer's input                    | computed again                                |
|---------------|-----------------------------------------------------|-----------------------------------------------|
| `none`        | the result of everything that is not elementwise    | elementwise operations, fused into their uses |
| `minimal`     | matrix products, what crossed the network, routing  | also norms and slots                          |
| `collectives` | what crossed the network, so none of it is repeated | everything else but the routing               |
| `full`        | nothing                                             | the layer                                     |

Where something is kept that a routing has put in its place, the routing is kept too, a few bytes a token: computed
again, a score may round the other way, and a token would look for its results where another expert's are.

The attention kernel keeps no scores under any policy; its backward pass makes them again. Weights are never saved: they
are constants of the pipeline's loop, and their compute copies would be kept once a tick. Tried and left: saving
elementwise results under `none`, too. That doubles what is saved (44 against 22 MB a device for 4 layers of d_model 64
and 8,192 tokens), and a CPU step takes half as long again.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax
from jax.ad_checkpoint import checkpoint_name

from moejax.mesh import EXPERT

LAYER_INPUT = "layer_input"
NETWORK = "network"
MATMUL = "matmul"
ROUTING = "routing"
ATTENTION_OUT = "attention_out"  # the name that `moejax.kernels.attention` gives its result

F = TypeVar("F", bound=Callable[..., Any])

_NAMES = {
    "minimal": (LAYER_INPUT, NETWORK, MATMUL, ROUTING, ATTENTION_OUT),
    "collectives": (LAYER_INPUT, NETWORK, ROUTING),
    "full": (LAYER_INPUT,),
}
_NOT_ELEMENTWISE = (
    "dot_general", "all_gather", "all_to_all", "psum_invariant", "reduce_scatter",
    "sort", "top_k", "cumsum", "gather", "reduce_max", "reduce_sum",
)  # fmt: skip


def _all_but_elementwise(primitive: Any, *_: Any, **params: Any) -> bool:
    if primitive.name == "name":
        return True
    gathers_weights = primitive.name == "all_gather" and EXPERT in params["axis_name"]
    return primitive.name in _NOT_ELEMENTWISE and not gathers_weights


def checkpoint(function: F, policy: str) -> F:
    """`jax.checkpoint(function)` under the policy of that name.

    The pipeline's tick is checkpointed, and so is each layer inside it: then the backward pass of a tick holds what the
    policy saves of its layers and one layer's insides. Without the layer's own, the elementwise results that `none`
    computes again would be stacked for all layers of the tick: 42.0 against 33.4 GB for `moe_16x10b` on 16 H100s with
    1,024 tokens.
    """
    names = _NAMES.get(policy)
    rule = jax.checkpoint_policies.save_only_these_names(*names) if names else _all_but_elementwise
    return cast(F, jax.checkpoint(function, policy=rule))


def named(x: jax.Array, name: str) -> jax.Array:
    """Marks `x` as something that a policy may keep."""
    return checkpoint_name(x, name)
