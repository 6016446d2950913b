"""The table of parameters: sizes, what is stored where, and what is said of layouts that do not fit."""

import dataclasses
import math

import jax
import pytest

from moejax.config import ConfigError, DispatchConfig, ModelConfig, ParallelConfig
from moejax.mesh import MeshConfig, abstract_mesh, build_mesh
from moejax.presets import mixtral_8x7b, moe_16x10b
from moejax.sharding import Param, check_layout, param_shapes, param_table

MODEL = ModelConfig(num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=16, vocab_size=256)
SPLIT = DispatchConfig(expert_axes=("expert",))


def make_mesh(*sizes, replica=1):
    config = MeshConfig(*sizes, replica=replica)
    return build_mesh(config, jax.devices()[: config.num_devices])


def table_of(model, mesh, dispatch=DispatchConfig(), **parallel):
    return param_table(model, dispatch, ParallelConfig(**parallel), mesh)


def leaves(table):
    return jax.tree.leaves_with_path(table, is_leaf=lambda x: isinstance(x, Param))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 2, 2), (8, 2, 1), (2, 1, 8), (2, 8, 1)])
@pytest.mark.parametrize(("model", "number"), [(moe_16x10b(), 10_263_825_664), (mixtral_8x7b(), 46_702_792_704)])
def test_sizes_are_the_published_ones_on_every_mesh(model, number, sizes):
    table = table_of(model, make_mesh(*sizes), SPLIT)
    assert sum(math.prod(param.shape) for _, param in leaves(table)) == number


LAYOUTS = [
    (make_mesh(4, 2, 2), DispatchConfig(), 1),
    (make_mesh(16, 1, 1), DispatchConfig(), 2),
    (make_mesh(2, 2, 4), SPLIT, 2),
    (make_mesh(2, 2, 2, replica=2), SPLIT, 1),
]
EVERYTHING = dataclasses.replace(
    MODEL, num_layers=6, num_kv_heads=4, num_dense_layers=2, dense_d_ff=24, shared_d_ff=16, d_model=64
)


@pytest.mark.parametrize(("mesh", "dispatch", "repeats"), LAYOUTS)
def test_what_is_large_is_stored_once_and_norms_at_most_once_a_tensor_group(mesh, dispatch, repeats):
    table = table_of(EVERYTHING, mesh, dispatch, repeats=repeats)
    shapes = param_shapes(table, mesh)
    for (path, p), shape in zip(leaves(table), jax.tree.leaves(shapes), strict=True):
        axes = [axis for dim in p.stored for axis in dim]
        assert len(axes) == len(set(axes)), path
        parts = math.prod(mesh.shape[axis] for axis in axes)
        assert math.prod(shape.sharding.shard_shape(p.shape)) * parts == math.prod(p.shape), path
        copies = mesh.size // mesh.shape.get("replica", 1) // parts
        # What no axis splits is small: norms and routers over `tensor`, and outside of the pipeline over its stages.
        limit = mesh.shape["tensor"] * (1 if "layers" in str(path[0]) else mesh.shape["pipeline"])
        assert copies <= (limit if p.std is None or "router" in str(path[-1]) else mesh.shape["pipeline"]), path
        if p.gather:
            assert p.stored[p.gather[0]] == p.gather[1], path


@pytest.mark.parametrize(("mesh", "dispatch", "repeats"), LAYOUTS)
def test_the_logical_shape_does_not_depend_on_the_mesh(mesh, dispatch, repeats):
    here = leaves(table_of(EVERYTHING, mesh, dispatch, repeats=repeats))
    alone = leaves(table_of(EVERYTHING, make_mesh(1, 1, 1)))
    for (path, p), (path_alone, p_alone) in zip(here, alone, strict=True):
        n = p.num_stack_dims
        assert (path, n, p.std) == (path_alone, p_alone.num_stack_dims, p_alone.std)
        assert p.shape[n:] == p_alone.shape[n:]
        assert math.prod(p.shape[:n]) == math.prod(p_alone.shape[:n])


def wrong(message, sizes=(1, 1, 1), *, model=None, dispatch=None, parallel=None, replica=1, **batch):
    return pytest.param(message, sizes, replica, model or {}, dispatch or {}, parallel or {}, batch, id=message[:60])


WRONG = [
    wrong(
        "num_experts=6 must be a multiple of expert × tensor = 4; try num_experts=8, or expert × tensor = 1, 2 or 3",
        (2, 1, 2), model={"num_experts": 6},
    ),
    wrong(
        "num_experts=6 must be a multiple of expert = 4; try num_experts=8, or expert = 1, 2 or 3",
        (4, 1, 1), model={"num_experts": 6}, dispatch={"expert_axes": ("expert",)},
    ),
    wrong(
        "num_heads=6 must be a multiple of tensor = 4; try num_heads=8, or tensor = 1, 2 or 3",
        (1, 1, 4), model={"num_heads": 6},
    ),
    wrong(
        "num_kv_heads=2 must be a multiple of tensor = 4; try num_kv_heads=4, or tensor = 1 or 2",
        (1, 1, 4),
    ),
    wrong(
        "d_model=36 must be a multiple of expert = 8; try d_model=40, or expert = 1, 2, 3, 4 or 6",
        (8, 1, 1), model={"d_model": 36},
    ),
    wrong(
        "d_ff=9 must be a multiple of tensor = 2; try d_ff=10, or tensor = 1",
        (1, 1, 2), model={"d_ff": 9}, dispatch={"expert_axes": ("expert",)},
    ),
    wrong(
        "d_model=36 must be a multiple of expert × tensor = 8; try d_model=40, or expert × tensor = 1, 2, 3, 4 or 6",
        (4, 1, 2), model={"d_model": 36, "shared_d_ff": 8},
    ),
    wrong(
        "d_model=36 must be a multiple of expert × pipeline × tensor = 8; try d_model=40, or",
        (4, 2, 1), model={"d_model": 36, "num_layers": 5, "num_dense_layers": 1, "dense_d_ff": 8},
    ),
    wrong(
        "vocab_size=250 must be a multiple of pipeline × tensor = 4; try vocab_size=252, or pipeline × tensor = 1 or 2",
        (1, 2, 2), model={"vocab_size": 250},
    ),
    wrong(
        "num_layers=4 must be a multiple of pipeline × repeats = 8; try num_layers=8, or pipeline × repeats = 1, 2 or",
        (1, 4, 1), parallel={"repeats": 2, "num_microbatches": 4},
    ),
    wrong(
        "num_layers - num_dense_layers=3 must be a multiple of pipeline × repeats = 2; try",
        (1, 2, 1), model={"num_dense_layers": 1, "dense_d_ff": 8},
    ),
    wrong(
        "num_microbatches=1 must be at least the pipeline's 2 stages when repeats=2",
        (1, 2, 1), parallel={"repeats": 2, "num_microbatches": 1},
    ),
    wrong("seq_len=10241 must be at most max_seq_len=10240", seq_len=10_241),
    wrong("seq_len=127 must be a multiple of tensor axis 2", (1, 1, 2), seq_len=127),
    wrong(
        "batch_size=30 must be a multiple of 16 = replica 2 × expert 4 × num_microbatches 2; try 16",
        (4, 1, 1), replica=2, batch_size=30,
    ),
    wrong(
        "batch_size=6 must be a multiple of 8 = expert 2 × num_microbatches 2 × accumulate 2; try 8",
        (2, 1, 1), batch_size=6, accumulate=2,
    ),
    wrong(
        "batch_size=10 must be a multiple of 8 = expert 2 × num_microbatches 2 × batch_split 2; try 8",
        (2, 1, 1), parallel={"batch_split": 2}, batch_size=10,
    ),
    wrong(
        "batch_size=20 must be a multiple of 8 = expert 2 × num_microbatches 2 × "
        "pipeline (leading dense layers run data-parallel over it) 2; try 16",
        (2, 2, 1), model={"num_layers": 5, "num_dense_layers": 1, "dense_d_ff": 8}, batch_size=20,
    ),
]  # fmt: skip


@pytest.mark.parametrize(("message", "sizes", "replica", "model", "dispatch", "parallel", "batch"), WRONG)
def test_layouts_that_do_not_fit_are_told_what_would(message, sizes, replica, model, dispatch, parallel, batch):
    with pytest.raises(ConfigError) as error:
        check_layout(
            dataclasses.replace(MODEL, **model), DispatchConfig(**dispatch), ParallelConfig(**parallel),
            make_mesh(*sizes, replica=replica), **batch,
        )  # fmt: skip
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("mesh", "dispatch", "repeats"), LAYOUTS)
def test_layouts_that_fit_pass(mesh, dispatch, repeats):
    check_layout(EVERYTHING, dispatch, ParallelConfig(2, repeats), mesh, batch_size=64, seq_len=128, accumulate=2)


@pytest.mark.parametrize(
    ("mesh", "hosts", "crossed"),
    [
        (MeshConfig(expert=8, hardware="h100"), 2, 1),
        (MeshConfig(expert=8, hardware="h100", hosts=4), 8, 4),
        (MeshConfig(expert=8, pipeline=2, hardware="h100", hosts=2, host_axis="pipeline"), 2, 1),
        (MeshConfig(expert=8, replica=2, hardware="h100", hosts=2, host_axis="replica"), 2, 1),
        (MeshConfig(expert=8, replica=2, hardware="h100", hosts=4), 4, 2),
    ],
)
def test_two_hops_need_the_hosts_that_the_expert_axis_crosses(mesh, hosts, crossed, fake_devices):
    model = dataclasses.replace(MODEL, num_layers=2, num_experts=16)
    placed = build_mesh(mesh, fake_devices(mesh.hosts, mesh.num_devices // mesh.hosts))
    for where in (mesh, placed):
        message = f"dispatch.hosts={hosts} must divide {crossed}, the hosts that the mesh's expert axis crosses"
        with pytest.raises(ConfigError, match=message):
            check_layout(model, DispatchConfig(hosts=hosts), ParallelConfig(), where)
        check_layout(model, DispatchConfig(hosts=crossed), ParallelConfig(), where)
    check_layout(model, DispatchConfig(hosts=hosts), ParallelConfig(), abstract_mesh(mesh))  # which knows no hosts
    virtual = dataclasses.replace(mesh, hardware="cpu")
    for where in (virtual, make_mesh(mesh.expert, mesh.pipeline, mesh.tensor, replica=mesh.replica)):
        check_layout(model, DispatchConfig(hosts=hosts), ParallelConfig(), where)
