"""Pipeline schedules: microbatches through stages, each stage visited `repeats` times, in one `scan`.

With M microbatches, P stages and R repeats, stage i works at tick t on item k = t - i: repeat k // M of microbatch
k % M. R = 1 is GPipe; R > 1 is the interleaved schedule (arXiv 2104.04473), whose bubble is P - 1 ticks of 1/R the
length. The last stage's results return to the first by the same `ppermute` that moves every other, P ticks after the
microbatch left; there they take the place of the microbatch they came from, so one buffer holds the inputs, what waits
for its next repeat, and in the end the outputs. (A slot must be read before it is replaced: M >= P when R > 1.)

Where the number of layers is not a multiple of the number of chunks, the last places of the last chunks have no layer.
Each layer is then inside a `cond`, on every stage, and XLA overlaps nothing across it, such as gathering the weights of
the next layer. Computing there and selecting would be worse: a router of zeros sends every token to the same experts.

Dimensions: M microbatches, b sequences, s local sequence, D model, R repeats, l layers of a chunk.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from moejax import remat
from moejax.kernels.manual import vary, varying
from moejax.layout import Layout
from moejax.mesh import PIPELINE

# (x_bsD, repeat, microbatch) -> (y_bsD, sums of this stage's chunk of layers)
Stage = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# (x_bsD, the layer's parameters) -> (y_bsD, the layer's sums)
Layer = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


def _check_closure(closed_over: Sequence[Any]) -> None:
    """Raises where a gradient would be summed over stages inside the branch that some of them skip: they would hang."""
    for x in closed_over:
        differentiable = isinstance(x, jax.core.Tracer) and jnp.issubdtype(x.dtype, jnp.floating)
        if differentiable and PIPELINE not in varying(x):
            raise ValueError(
                f"a stage or layer closes over {jax.typeof(x)}, the same on every stage; give it "
                f"vary(x, ({PIPELINE!r},)): the sum of its gradient over stages cannot stand where some of them skip"
            )


def _idle(work: Callable[..., tuple[jax.Array, Any]], x_bsD: jax.Array, *args: Any, in_cond: bool) -> Any:
    """Returns what takes the place of `work(x_bsD, *args)` where there is none: it passes x on, with sums of 0."""
    jaxpr, (_, sums) = jax.make_jaxpr(work, return_shape=True)(x_bsD, *args)
    if in_cond:
        _check_closure(jaxpr.consts)
    no_sums = jax.tree.map(lambda s: vary(jnp.zeros(s.shape, s.dtype), varying(x_bsD)), sums)
    return lambda x_bsD, *_: (x_bsD, no_sums)


def run_chunk(
    layer: Layer, x_bsD: jax.Array, params_l: Any, chunk: jax.Array, num_layers: int, layout: Layout
) -> tuple[jax.Array, Any]:
    """Runs one of this stage's chunks, layer by layer in a `scan`; each layer is rematerialized by `layout.remat`.

    Args:
        params_l: parameters of the chunk, with its places in front.
        chunk: which of the stage's, int32.
        num_layers: of all chunks of all stages together. Places after those are empty: they pass x on, with sums of 0.

    Returns [b, s, D], and the layers' sums, [l, ...].
    """
    num_places = jax.tree.leaves(params_l)[0].shape[0]
    if layout.pipeline_repeats * lax.axis_size(PIPELINE) * num_places == num_layers:
        return lax.scan(remat.checkpoint(layer, layout.remat), x_bsD, params_l)
    first = (chunk * lax.axis_size(PIPELINE) + lax.axis_index(PIPELINE)) * num_places
    filled_l = first + jnp.arange(num_places, dtype=jnp.int32) < num_layers
    idle = _idle(layer, x_bsD, jax.tree.map(lambda w_l: w_l[0], params_l), in_cond=True)

    def place(x_bsD: jax.Array, xs: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        filled, params = xs
        return lax.cond(filled, layer, idle, x_bsD, params)

    return lax.scan(remat.checkpoint(place, layout.remat), x_bsD, (filled_l, params_l))


def run_pipeline(stage: Stage, x_MbsD: jax.Array, layout: Layout) -> tuple[jax.Array, Any]:
    """Runs every microbatch through all chunks of layers: `layout.pipeline_repeats` on each stage.

    With `layout.bubble="skip"` a stage without work does nothing, in a `cond` that all devices of a stage decide alike;
    otherwise it works on what lies there and the result is not used. An accelerator would wait either way, and the
    `cond` would keep collectives from overlapping; virtual devices share their cores, so there work saved is time
    saved (a third of it for 2 stages and 2 microbatches).

    What one tick does is rematerialized by `layout.remat`. The checkpoint is around the `cond`, for a `cond` hands what
    its branches save to the loop as values of the tick, the weights too, which the loop would stack.

    Takes and returns [M, b, s, D], the same on every stage; returns also the stage's sums over microbatches, [R, ...].
    """
    with jax.named_scope("pipeline"):
        x_MbsD = vary(x_MbsD, (PIPELINE,))
    num_stages, index = lax.axis_size(PIPELINE), lax.axis_index(PIPELINE)
    num_microbatches, repeats, skip_bubble = x_MbsD.shape[0], layout.pipeline_repeats, layout.bubble == "skip"
    to_next = [(i, (i + 1) % num_stages) for i in range(num_stages)]

    nothing_bsD, first = jnp.zeros_like(x_MbsD[0]), jnp.zeros((), jnp.int32)
    idle = _idle(stage, nothing_bsD, first, first, in_cond=skip_bubble)
    _, no_sums = idle(nothing_bsD)

    @functools.partial(remat.checkpoint, policy=layout.remat)
    def work(live: jax.Array, x_bsD: jax.Array, repeat: jax.Array, microbatch: jax.Array) -> tuple[jax.Array, Any]:
        if skip_bubble:
            return lax.cond(live, stage, idle, x_bsD, repeat, microbatch)
        y_bsD, sums = stage(x_bsD, repeat, microbatch)
        return y_bsD, jax.tree.map(lambda s: jnp.where(live, s, jnp.zeros_like(s)), sums)

    def put(buffer_MbsD: jax.Array, arrived_bsD: jax.Array, item: jax.Array | int) -> jax.Array:
        slot = jnp.asarray(item) % num_microbatches
        kept_bsD = lax.dynamic_index_in_dim(buffer_MbsD, slot, keepdims=False)
        new_bsD = jnp.where((index == 0) & (item >= 0), arrived_bsD, kept_bsD)
        return lax.dynamic_update_index_in_dim(buffer_MbsD, new_bsD, slot, 0)

    def tick(carry: Any, t: jax.Array) -> tuple[Any, None]:
        arrived_bsD, buffer_MbsD, sums_R = carry
        buffer_MbsD = put(buffer_MbsD, arrived_bsD, t - num_stages)
        item = t - index
        live = (item >= 0) & (item < repeats * num_microbatches)
        repeat, microbatch = jnp.clip(item // num_microbatches, 0, repeats - 1), item % num_microbatches
        first_bsD = lax.dynamic_index_in_dim(buffer_MbsD, microbatch, keepdims=False)
        x_bsD = jnp.where(index == 0, first_bsD, arrived_bsD)
        y_bsD, sums = work(live, x_bsD, repeat, microbatch)
        with jax.named_scope("pipeline"):
            arrived_bsD = lax.ppermute(y_bsD, PIPELINE, to_next)
        sums_R = jax.tree.map(lambda total, s: total.at[repeat].add(s), sums_R, sums)
        return (arrived_bsD, buffer_MbsD, sums_R), None

    sums_R = jax.tree.map(lambda s: jnp.repeat(s[None], repeats, axis=0), no_sums)
    with jax.named_scope("pipeline"):
        start = (nothing_bsD, x_MbsD, sums_R)
        (arrived_bsD, x_MbsD, sums_R), _ = lax.scan(tick, start, jnp.arange(layout.ticks, dtype=jnp.int32))
        x_MbsD = put(x_MbsD, arrived_bsD, layout.ticks - num_stages)  # the results, on stage 0
        return lax.psum(jnp.where(index == 0, x_MbsD, jnp.zeros_like(x_MbsD)), PIPELINE), sums_R
