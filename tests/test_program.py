"""Programs: batches of the layout's shape and no other, the mesh that the layout asks for, and other layouts of one."""

import dataclasses

import jax
import numpy as np
import pytest
from cases import MODEL, Case, make_batch, relative_error
from jax.sharding import PartitionSpec as P

from moejax.batch import BATCH_ARRAYS
from moejax.checks import ConfigError
from moejax.config import BalanceConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig, abstract_mesh, build_mesh
from moejax.program import Program
from moejax.sharding import param_shapes

CASE = Case(2, 2, 1)
LAYOUT = CASE.layout


def run(name, program, batch, params=None):
    """What a per-device function returns for a global batch; without `params`, its shapes."""
    tokens, specs = batch["tokens"], program.param_specs
    spec, columns = program.batch_spec, P(program.layout.mesh.batch_axes, ("pipeline", "tensor"))
    arguments, in_specs, out_specs = {
        "loss": ((batch,), (spec,), (P(), program.metric_specs)),
        "logits": ((tokens, batch["segment_ids"]), (spec, spec), program.logits_spec),
        "next_token_logits": ((tokens, np.int32(1)), (spec, P()), columns),
        "count_assignments": (
            ({key: x_BS[None] for key, x_BS in batch.items()},),
            (P(None, *spec),),
            P(None, "pipeline"),
        ),
    }[name]
    function = getattr(program, name)
    if name == "count_assignments":
        function = lambda params, slices: program.count_assignments(params, slices)[:, None]  # noqa: E731
    sharded = program.sharded(function, (specs, *in_specs), out_specs)
    if params is None:
        return jax.eval_shape(sharded, param_shapes(program.table, program.mesh), *arguments)
    return jax.jit(sharded)(params, *arguments)


@pytest.mark.parametrize("name", ["loss", "logits", "next_token_logits", "count_assignments"])
@pytest.mark.parametrize(("batch_size", "seq_len"), [(8, 16), (16, 12), (32, 8)])
def test_batches_of_another_shape_are_refused_on_each_device_until_asked_for(name, batch_size, seq_len):
    program, batch = CASE.program, make_batch(MODEL.vocab_size, batch_size, seq_len)
    run(name, program, CASE.batch)
    message = rf"^tokens_nS has shape \({batch_size // 2}, {seq_len}\) on each device, and the layout's is \(8, 16\); "
    with pytest.raises(ConfigError, match=message + r"use program\.for_batch"):
        run(name, program, batch)
    run(name, program.for_batch(batch_size, seq_len), batch)


@pytest.mark.full
def test_a_program_for_another_batch_is_that_of_its_layout_with_the_same_parameters():
    program = CASE.program.with_layout(grad_accumulation_steps=2).for_batch(8, 12)
    assert program == Program(MODEL, LAYOUT.replace(batch_size=8, seq_len=12), CASE.mesh, CASE.balance)
    assert program.table == CASE.program.table
    batch, params = make_batch(MODEL.vocab_size, 8, 12), CASE.place(CASE.logical_params)
    (loss, _), one_device = run("loss", program, batch, params), Case(1, 1, 1, batch_size=8, seq_len=12)
    assert relative_error(loss, one_device.result[0]["loss"]) < 1e-5


def test_a_batch_that_does_not_fit_the_layout_has_no_program():
    with pytest.raises(ConfigError, match="batch_size=6 must be a multiple of 4 = expert 2 × num_microbatches 2"):
        CASE.program.for_batch(6, 16)
    with pytest.raises(ConfigError, match="seq_len=20000 must be at most max_seq_len=10240"):
        CASE.program.for_batch(8, 20_000)
    split = Program(MODEL, Layout(MeshConfig(2, 1, 2)), abstract_mesh(MeshConfig(2, 1, 2)))
    with pytest.raises(ConfigError, match="seq_len=15 must be a multiple of tensor axis 2"):
        split.for_batch(32, 15)


def test_an_accumulated_batch_is_taken_by_slices():
    program = CASE.program.with_layout(grad_accumulation_steps=2)
    with pytest.raises(ConfigError, match=r"shape \(8, 16\) on each device, and the layout's is \(4, 16\)"):
        run("loss", program, CASE.batch)
    run("loss", program, {name: x_BS[:8] for name, x_BS in CASE.batch.items()})


def test_the_mesh_is_the_layouts():
    assert dict(Program(MODEL, Layout(MeshConfig(4, 2, 2))).mesh.shape) == {"expert": 4, "pipeline": 2, "tensor": 2}
    with pytest.raises(ConfigError, match="mesh expert=4 × pipeline=1 × tensor=1 needs 4 devices but there are 16"):
        Program(MODEL, Layout(MeshConfig(4)))
    message = (
        r"mesh={'expert': 2, 'pipeline': 1, 'tensor': 1} must have the axes of "
        r"layout.mesh={'expert': 1, 'pipeline': 2, 'tensor': 1}"
    )
    with pytest.raises(ConfigError, match=message):
        Program(MODEL, Layout(MeshConfig(1, 2)), build_mesh(MeshConfig(2), jax.devices()[:2]))


def test_what_is_auto_is_resolved_for_the_devices_of_the_mesh():
    layout = Layout(MeshConfig(4), batch_size=16)
    for hardware, bubble, parts in (("cpu", "skip", 1), ("h100", "compute", 2), ("tpu_v5p", "compute", 2)):
        program = Program(MODEL, layout, abstract_mesh(MeshConfig(4, hardware=hardware)))
        assert (program.resolved.bubble, program.resolved.batch_split) == (bubble, parts)
        assert program.layout == layout


def test_only_a_strategy_that_drops_is_replaced_by_one_that_does_not():
    drops = CASE.program.with_layout(strategy="capacity")
    assert drops.without_drops() == CASE.program
    ragged = CASE.program.with_layout(strategy="ragged")
    assert ragged.without_drops() is ragged
    assert drops.without_drops().mesh is drops.mesh


def test_a_batchs_shapes_are_those_that_a_batch_has():
    placed = CASE.place_batch(CASE.batch)
    shapes = CASE.program.batch_shapes
    assert set(shapes) == set(BATCH_ARRAYS) == set(placed)
    for name, x_BS in placed.items():
        assert (shapes[name].shape, shapes[name].dtype) == (x_BS.shape, x_BS.dtype)
        assert shapes[name].sharding.is_equivalent_to(x_BS.sharding, 2)


def test_a_rate_without_a_bias_is_refused():
    with pytest.raises(ConfigError, match=r"balance\.bias_update_rate=0\.01 has no bias to move"):
        dataclasses.replace(CASE.program, balance=BalanceConfig(bias_update_rate=0.01))


def test_buffers_have_one_size_where_nothing_is_exchanged():
    assert Case(1, 2, 1).program.balancer.capacity_factors == (1.5,)
    assert len(CASE.program.balancer.capacity_factors) > 1
