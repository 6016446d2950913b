"""The pipeline is the sequence of its stages: values, sums and gradients, for any microbatches, stages and repeats."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import relative_error
from jax import lax
from jax.sharding import PartitionSpec as P
from tiers import full_unless

from moejax.layout import Layout
from moejax.mesh import PIPELINE, MeshConfig, build_mesh
from moejax.pipeline import run_chunk, run_pipeline

B, S, D = 2, 3, 4
SCHEDULES = [  # microbatches, stages, repeats
    (1, 1, 1), (3, 1, 1), (2, 1, 3), (1, 2, 1), (4, 2, 1), (2, 2, 2), (3, 2, 2), (2, 4, 1), (4, 4, 1), (5, 4, 1),
    (4, 4, 2), (5, 4, 3), (8, 8, 2), (2, 16, 1),
]  # fmt: skip
FAST = [(2, 1, 3), (4, 2, 1), (3, 2, 2), (5, 4, 3)]


def layer(w_DD, bias_D, x_bsD):
    """A stage whose order matters, which is not the same for two microbatches, and which is not zero at zero."""
    return jnp.tanh(x_bsD @ w_DD + bias_D[None, None] + 0.1)


def make_layout(num_microbatches, num_stages, repeats, bubble="skip"):
    return Layout(
        MeshConfig(pipeline=num_stages), num_microbatches=num_microbatches, pipeline_repeats=repeats, remat="none",
        bubble=bubble,
    )  # fmt: skip


def in_pipeline(layout):
    """(w [R, P, D, D], bias [M, D], x [M, b, s, D]) -> (outputs, sums and calls of each repeat and stage)."""
    mesh = build_mesh(layout.mesh, jax.devices()[: layout.mesh.num_devices])

    def device(w_RpDD, bias_MD, x_MbsD):
        def stage(x_bsD, repeat, microbatch):
            y_bsD = layer(w_RpDD[repeat, 0], bias_MD[microbatch], x_bsD)
            return y_bsD, {"sum": y_bsD.sum(), "calls": jnp.ones_like(y_bsD[0, 0, 0])}

        bias_MD = lax.pcast(bias_MD, (PIPELINE,), to="varying")
        y_MbsD, sums_R = run_pipeline(stage, x_MbsD, layout)
        return y_MbsD, jax.tree.map(lambda s: s[:, None], sums_R)

    stages = P(None, PIPELINE)
    return jax.shard_map(device, mesh=mesh, in_specs=(stages, P(), P()), out_specs=(P(), stages))


def in_sequence(w_RPDD, bias_MD, x_MbsD):
    outputs, sums = [], jnp.zeros(w_RPDD.shape[:2])
    for x_bsD, bias_D in zip(x_MbsD, bias_MD, strict=True):
        for r, stages in enumerate(w_RPDD):
            for p, w_DD in enumerate(stages):
                x_bsD = layer(w_DD, bias_D, x_bsD)
                sums = sums.at[r, p].add(x_bsD.sum())
        outputs.append(x_bsD)
    return jnp.stack(outputs), {"sum": sums, "calls": jnp.full_like(sums, len(x_MbsD))}


@pytest.mark.parametrize(("num_microbatches", "num_stages", "repeats"), full_unless(FAST.__contains__, SCHEDULES))
@pytest.mark.parametrize("bubble", ["skip", "compute"])
def test_pipeline_is_the_sequence_of_its_stages(num_microbatches, num_stages, repeats, bubble):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((repeats, num_stages, D, D)).astype(np.float32)
    bias = rng.standard_normal((num_microbatches, D)).astype(np.float32)
    x = rng.standard_normal((num_microbatches, B, S, D)).astype(np.float32)
    weight_of_output, weight_of_sum = rng.standard_normal(x.shape).astype(np.float32), rng.random(w.shape[:2])

    def scalar(run, *args):
        y, sums = run(*args)
        total = (y * weight_of_output).sum() + (sums["sum"] * weight_of_sum.astype(np.float32)).sum()
        return total, (y, sums)

    grad = functools.partial(jax.grad, argnums=(0, 1, 2), has_aux=True)
    layout = make_layout(num_microbatches, num_stages, repeats, bubble)
    actual = jax.jit(grad(functools.partial(scalar, in_pipeline(layout))))(w, bias, x)
    expected = grad(functools.partial(scalar, in_sequence))(w, bias, x)
    assert max(jax.tree.leaves(jax.tree.map(relative_error, actual, expected))) < 1e-5


@pytest.mark.parametrize("bubble", ["skip", "compute"])
def test_places_without_a_layer_are_passed_over(bubble):
    """5 layers on 2 stages with 2 chunks of 2 places each: the last three places are empty."""
    num_layers, layout = 5, make_layout(2, 2, 2, bubble)
    rng = np.random.default_rng(0)
    w_LDD = rng.standard_normal((num_layers, D, D)).astype(np.float32)
    x_MbsD = rng.standard_normal((2, B, S, D)).astype(np.float32)

    def one(x_bsD, w_DD):
        y_bsD = layer(w_DD, jnp.zeros(D), x_bsD)
        return y_bsD, y_bsD.sum()

    def device(w_R1lDD, x_MbsD):
        def stage(x_bsD, chunk, microbatch):
            return run_chunk(one, x_bsD, w_R1lDD[chunk, 0], chunk, num_layers, layout)

        y_MbsD, sums_Rl = run_pipeline(stage, x_MbsD, layout)
        return y_MbsD, sums_Rl[:, None]

    stages, mesh = P(None, PIPELINE), build_mesh(layout.mesh, jax.devices()[:2])
    on_mesh = jax.shard_map(device, mesh=mesh, in_specs=(stages, P()), out_specs=(P(), stages))

    def in_pipeline(w_LDD, x_MbsD):
        y_MbsD, sums_RPl = on_mesh(jnp.pad(w_LDD, ((0, 3), (0, 0), (0, 0))).reshape(2, 2, 2, D, D), x_MbsD)
        return y_MbsD, sums_RPl.reshape(-1)

    def in_sequence(w_LDD, x_MbsD):
        sums_L = []
        for w_DD in w_LDD:
            x_MbsD = jnp.stack([one(x_bsD, w_DD)[0] for x_bsD in x_MbsD])
            sums_L.append(x_MbsD.sum())
        return x_MbsD, jnp.stack([*sums_L, *jnp.zeros(3)])

    def scalar(run, *args):
        y_MbsD, sums_L = run(*args)
        return (y_MbsD * np.arange(y_MbsD.size, dtype=np.float32).reshape(y_MbsD.shape)).sum() + (sums_L**2).sum(), (
            y_MbsD,
            sums_L,
        )

    grad = functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    actual = jax.jit(grad(functools.partial(scalar, in_pipeline)))(w_LDD, x_MbsD)
    expected = grad(functools.partial(scalar, in_sequence))(w_LDD, x_MbsD)
    assert max(jax.tree.leaves(jax.tree.map(relative_error, actual, expected))) < 1e-5


@pytest.mark.parametrize(("num_microbatches", "num_stages", "repeats"), SCHEDULES)
def test_the_schedule_is_as_long_as_it_says(num_microbatches, num_stages, repeats):
    shapes = (
        jax.ShapeDtypeStruct((repeats, num_stages, D, D), jnp.float32),
        jax.ShapeDtypeStruct((num_microbatches, D), jnp.float32),
        jax.ShapeDtypeStruct((num_microbatches, B, S, D), jnp.float32),
    )
    layout = make_layout(num_microbatches, num_stages, repeats)
    jaxpr = jax.make_jaxpr(in_pipeline(layout))(*shapes)
    (loop,) = [e for e in jaxpr.eqns[0].params["jaxpr"].eqns if e.primitive.name == "scan"]
    assert loop.params["length"] == layout.ticks == repeats * num_microbatches + num_stages - 1


def test_a_skipped_stage_cannot_hold_a_sum_over_stages():
    """Its gradient would wait for stages that are not there."""
    layout = make_layout(2, 2, 1)
    mesh = build_mesh(layout.mesh, jax.devices()[:2])

    def device(scale, x_MbsD):
        stage = lambda x_bsD, repeat, microbatch: (x_bsD * scale, {})  # noqa: E731
        return run_pipeline(stage, x_MbsD, layout)[0]

    function = jax.shard_map(device, mesh=mesh, in_specs=P(), out_specs=P())
    with pytest.raises(ValueError, match=r"a stage or layer closes over .*; give it vary\(x, \('pipeline',\)\)"):
        jax.eval_shape(function, jnp.ones(()), jnp.ones((2, B, S, D)))
