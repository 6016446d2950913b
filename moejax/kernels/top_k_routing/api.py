"""Top-k routing: one name, a backend for each platform."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from moejax.kernels import manual
from moejax.kernels.platform import implementation_for
from moejax.kernels.top_k_routing import reference
from moejax.kernels.top_k_routing.contract import Routing, RoutingSums, Rules, Score
from moejax.remat import ROUTING, named

Implementation = Literal["reference", "pallas_gpu", "pallas_tpu"]

_BY_PLATFORM: dict[str, Implementation] = {
    "cpu": "reference",
    "cuda": "pallas_gpu",
    "gpu": "pallas_gpu",
    "tpu": "pallas_tpu",
}


def routing_implementation(platform: str | None = None) -> Implementation:
    """The implementation that routing uses on `platform`: "cpu", "cuda" (or "gpu") or "tpu".

    None means the platform that the surrounding program is for, see `moejax.kernels.platform`.
    """
    return implementation_for("routing", _BY_PLATFORM, platform)


def top_k_routing(
    logits_TE: jax.Array,
    bias_E: jax.Array | None = None,
    *,
    experts_per_token: int,
    score: Score = "softmax",
    renormalize: bool = True,
    num_sequences: int = 1,
    num_groups: int = 1,
    groups_per_token: int = 1,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Routing, RoutingSums]:
    """Sends each token to the K experts of the highest score + bias, and sums up what losses and metrics need.

    Gates come from the scores alone: the bias only selects (DeepSeek-V3, arXiv 2412.19437, eq. 16), and gets no
    gradient. Ties go to the lower expert id. Differentiable with respect to the logits through `gate_TK`, `prob_bE` and
    `z`; the backward pass computes the scores again, so that only the logits, the experts and the gates are kept. Works
    on the per-device arrays inside `jax.shard_map` (with `check_vma=True`, its default) as well as outside.

    Args:
      logits_TE: [tokens, experts], floating point; computed with in float32.
      bias_E: float32 [experts], finite; None for no bias.
      experts_per_token: K, from 1 to E.
      score: "softmax" over the experts, or "sigmoid" of each logit.
      renormalize: divide the chosen gates by their sum (Mixtral, arXiv 2401.04088), or take the scores as they are.
      num_sequences: b, the number of equal runs of consecutive tokens that are summed over separately.
      num_groups: equal groups of consecutive experts.
      groups_per_token: best groups, whose experts alone a token visits. A group is as good as the sum of its two best
        values of score + bias or, without a bias, as its best score (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; V2,
        2405.04434, section 2.2.2). Ties go to the lower group.
      implementation: "reference", "pallas_gpu" or "pallas_tpu"; None for `routing_implementation()`.
      interpret: evaluate a Pallas kernel's body with plain jax operations, on any device: slow, for tests.

    Raises:
      ValueError: an argument has the wrong shape, dtype or value.
    """
    if logits_TE.ndim != 2 or not jnp.issubdtype(logits_TE.dtype, jnp.floating):
        raise ValueError(f"logits_TE is {logits_TE.dtype}{logits_TE.shape}; must be floating point [tokens, experts]")
    rules = Rules(experts_per_token, score, renormalize, num_sequences, num_groups, groups_per_token)
    T, E = logits_TE.shape
    _check(rules, T, E, bias_E)
    with jax.named_scope("route"):
        return _call(rules, implementation or routing_implementation(), interpret, (logits_TE,), bias_E)


def route_tokens(
    x_TD: jax.Array,
    w_DE: jax.Array,
    bias_E: jax.Array | None = None,
    *,
    experts_per_token: int,
    score: Score = "softmax",
    renormalize: bool = True,
    num_sequences: int = 1,
    num_groups: int = 1,
    groups_per_token: int = 1,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> tuple[Routing, RoutingSums]:
    """`top_k_routing` of the logits x w, which the kernels of GPU and TPU compute inside and never write to memory.

    The logits are float32 sums of exact products: two factors of one 16-bit dtype are multiplied as they are, others as
    float32. The backward pass of the kernels computes them again, writes them, and multiplies in float32. A token whose
    logits overflow gives no gradient; one whose activations are not finite gives w a gradient that is not either.

    Args:
      x_TD: activations [tokens, d_model], floating point.
      w_DE: the router's weights [d_model, experts], floating point.

    The other arguments, the results and the errors are those of `top_k_routing`.
    """
    for name, x, dims in (("x_TD", x_TD, "[tokens, d_model]"), ("w_DE", w_DE, "[d_model, experts]")):
        if x.ndim != 2 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} is {x.dtype}{x.shape}; must be floating point {dims}")
    if x_TD.shape[1] != w_DE.shape[0]:
        raise ValueError(f"w_DE has shape {w_DE.shape}; must be ({x_TD.shape[1]}, experts) for x's {x_TD.shape}")
    rules = Rules(experts_per_token, score, renormalize, num_sequences, num_groups, groups_per_token)
    _check(rules, x_TD.shape[0], w_DE.shape[1], bias_E)
    implementation = implementation or routing_implementation()
    with jax.named_scope("route"):
        inputs = (reference.router_logits(x_TD, w_DE),) if implementation == "reference" else (x_TD, w_DE)
        return _call(rules, implementation, interpret, inputs, bias_E)


def _check(rules: Rules, T: int, E: int, bias_E: jax.Array | None) -> None:
    if not 1 <= rules.experts_per_token <= E:
        raise ValueError(f"experts_per_token={rules.experts_per_token} must be from 1 to the number of experts, {E}")
    if rules.score not in get_args(Score):
        raise ValueError(f"score={rules.score!r} must be one of {', '.join(map(repr, get_args(Score)))}")
    if not 1 <= rules.groups_per_token <= rules.num_groups:
        raise ValueError(f"groups_per_token={rules.groups_per_token} must be from 1 to num_groups={rules.num_groups}")
    size = E // rules.num_groups
    if E % rules.num_groups or (rules.num_groups > 1 and size < 2):
        raise ValueError(
            f"num_groups={rules.num_groups} must be 1, or divide the number of experts, {E}, into groups of 2 or more"
        )
    if rules.experts_per_token > rules.groups_per_token * size:
        raise ValueError(
            f"experts_per_token={rules.experts_per_token} must be at most {rules.groups_per_token * size}, the experts "
            f"of {rules.groups_per_token} of {rules.num_groups} groups"
        )
    if rules.num_sequences < 1 or T % rules.num_sequences or not T:
        raise ValueError(f"num_sequences={rules.num_sequences} must divide the number of tokens, {T}, which is not 0")
    if bias_E is not None and (bias_E.shape != (E,) or bias_E.dtype != jnp.float32):
        raise ValueError(f"bias_E is {bias_E.dtype}{bias_E.shape}; must be float32({E},)")


def _call(
    rules: Rules, implementation: str, interpret: bool, inputs: tuple[jax.Array, ...], bias_E: jax.Array | None
) -> tuple[Routing, RoutingSums]:
    run = _load(implementation, interpret)
    if len(inputs) == 1:
        inputs = (inputs[0].astype(jnp.float32),)
    arrays = manual.vary_alike(*inputs, *(() if bias_E is None else (bias_E,)))
    return _route(rules, run, arrays[: len(inputs)], None if bias_E is None else arrays[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _route(
    rules: Rules, run: Callable[..., Any], inputs: tuple[jax.Array, ...], bias_E: jax.Array | None
) -> tuple[Routing, RoutingSums]:
    return run(rules, *inputs, bias_E)


def _forward(
    rules: Rules, run: Callable[..., Any], inputs: tuple[jax.Array, ...], bias_E: jax.Array | None
) -> tuple[tuple[Routing, RoutingSums], Any]:
    # Kept as a whole, or a remat policy could keep a row's largest score, compute the scores again, rounded otherwise
    # by another fusion, and find none that equals it.
    routing, sums = jax.tree.map(lambda x: named(x, ROUTING), run(rules, *inputs, bias_E))
    return (routing, sums), (inputs, routing._replace(position_TK=None))


def _backward(rules: Rules, run: Callable[..., Any], saved: Any, cotangents: Any) -> tuple[Any, None]:
    # Plain jax on every platform: a softmax's gradient, and matrix products. It does not fuse into one pass: compiled
    # for an H100 it is four sums along the rows and an elementwise pass, which read the logits five times.
    inputs, routing = saved
    drouting, dsums = cotangents
    logits_TE, pull_back = inputs[0], lambda dlogits_TE: (dlogits_TE,)
    if len(inputs) == 2:
        logits_TE, pull_back = jax.vjp(reference.router_logits, *inputs)
    dlogits_TE = reference.gradient(rules, logits_TE, routing, drouting.gate_TK, dsums.prob_bE, dsums.z)
    return pull_back(dlogits_TE), None


_route.defvjp(_forward, _backward)


@functools.cache
def _load(implementation: str, interpret: bool) -> Callable[..., tuple[Routing, RoutingSums]]:
    # Imported when used: Pallas costs a second to import and brings nothing to a CPU run.
    if implementation == "reference":
        return reference.route
    if implementation == "pallas_gpu":
        from moejax.kernels.top_k_routing import pallas_gpu

        return functools.partial(pallas_gpu.route, interpret=interpret)
    if implementation == "pallas_tpu":
        from moejax.kernels.top_k_routing import pallas_tpu

        return functools.partial(pallas_tpu.route, interpret=interpret)
    raise ValueError(
        f"implementation={implementation!r} must be one of {', '.join(map(repr, get_args(Implementation)))}"
    )
