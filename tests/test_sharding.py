"""The table of parameters: sizes, what is stored where, and how each is used."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax import moe
from moejax.config import (
    AttentionConfig,
    DispatchConfig,
    LatentConfig,
    ModelConfig,
    OptimizerConfig,
    RouterConfig,
)
from moejax.layout import Layout
from moejax.mesh import MeshConfig, abstract_mesh
from moejax.nn import attention, embedding, experts, feed_forward, norm, weights
from moejax.presets import mixtral_8x7b, moe_16x10b
from moejax.program import Program
from moejax.sharding import STACK_DIMS, Param, param_shapes, param_table
from moejax.train.optimizer import make_optimizer

MODEL = ModelConfig(
    num_layers=4, d_model=32, attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=8), d_ff=16,
    vocab_size=256,
)  # fmt: skip
SPLIT = DispatchConfig(expert_axes=("expert",))


def leaves(table):
    return jax.tree.leaves_with_path(table, is_leaf=lambda x: isinstance(x, Param))


@pytest.mark.parametrize("sizes", [(1, 1, 1), (4, 2, 2), (8, 2, 1), (2, 1, 8), (2, 8, 1)])
@pytest.mark.parametrize(("model", "number"), [(moe_16x10b(), 10_263_825_664), (mixtral_8x7b(), 46_702_792_704)])
def test_sizes_are_the_published_ones_on_every_mesh(model, number, sizes):
    table = param_table(model, Layout(MeshConfig(*sizes), dispatch=SPLIT))
    assert sum(math.prod(param.shape) for _, param in leaves(table)) == number


OF_HEADS = ("norm_q_H", "norm_k_H", "norm_q_NH", "norm_k_KH", "b_q_NH", "b_kv_GKH")
LAYOUTS = [
    Layout(MeshConfig(4, 2, 2)),
    Layout(MeshConfig(16, 1, 1), pipeline_repeats=2),
    Layout(MeshConfig(2, 2, 4), pipeline_repeats=2, dispatch=SPLIT),
    Layout(MeshConfig(2, 2, 2, replica=2), dispatch=SPLIT),
]
EVERYTHING = dataclasses.replace(
    MODEL, num_layers=6, num_dense_layers=2, dense_d_ff=24, shared_d_ff=16, d_model=64, shared_gate=True,
    attention=dataclasses.replace(MODEL.attention, qk_norm="projection", bias=True, output_bias=True),
)  # fmt: skip


LATENT = dataclasses.replace(EVERYTHING, attention=AttentionConfig(4, 4, 12, latent=LatentConfig(16, 32, 4, 8)))


@pytest.mark.parametrize("model", [EVERYTHING, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_large_is_stored_once_and_norms_at_most_once_a_tensor_group(layout, model):
    table, mesh = param_table(model, layout), layout.mesh
    shapes = param_shapes(table, abstract_mesh(mesh))
    for (path, p), shape in zip(leaves(table), jax.tree.leaves(shapes), strict=True):
        axes = [axis for dim in p.stored for axis in dim]
        assert len(axes) == len(set(axes)), path
        parts = math.prod(mesh.shape[axis] for axis in axes)
        assert math.prod(shape.sharding.shard_shape(p.shape)) * parts == math.prod(p.shape), path
        copies = mesh.num_devices // mesh.replica // parts
        # What no axis splits is small: norms, biases and routers over `tensor`, and outside of the pipeline over its
        # stages; vectors of heads over `expert`, too.
        limit = mesh.shape["tensor"] * (1 if "layers" in str(path[0]) else mesh.shape["pipeline"])
        if path[-1].key in OF_HEADS:
            limit *= mesh.shape["expert"]
        small = p.std is None or p.std == 0 or "router" in path[-1].key
        assert copies <= (limit if small else mesh.shape["pipeline"]), path
        if p.gather:
            assert p.stored[p.gather[0]] == p.gather[1], path


@pytest.mark.parametrize("model", [EVERYTHING, LATENT], ids=["grouped", "latent"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_logical_shape_does_not_depend_on_the_mesh(layout, model):
    here, alone = leaves(param_table(model, layout)), leaves(param_table(model, Layout()))
    for (path, p), (path_alone, p_alone) in zip(here, alone, strict=True):
        n = p.num_stack_dims
        assert (path, n, p.std) == (path_alone, p_alone.num_stack_dims, p_alone.std)
        assert n == STACK_DIMS.get(path[0].key, 0)
        assert p.shape[n:] == p_alone.shape[n:]
        assert math.prod(p.shape[:n]) == math.prod(p_alone.shape[:n])


MATRIX, NORM, BIAS = (True, "model"), (False, "float32"), (False, "model")
ROUTER, SELECTION = (True, "float32"), (False, None)
ATTENTION = {
    "norm_D": NORM, "w_q_DNH": MATRIX, "w_kv_DGKH": MATRIX, "w_o_NHD": MATRIX,
    "norm_q_NH": NORM, "norm_k_KH": NORM, "b_q_NH": BIAS, "b_kv_GKH": BIAS, "b_o_D": BIAS,
}  # fmt: skip
FEED_FORWARD = {"w_in_DGF": MATRIX, "w_out_FD": MATRIX}
USES = {  # whether weight decay pulls it to 0, and the dtype that it is used in
    "embed": {"table_VD": (True, "float32")},
    "dense_layers": {"attention": ATTENTION, "feed_forward_norm_D": NORM, "feed_forward": FEED_FORWARD},
    "layers": {
        "attention": ATTENTION,
        "moe_norm_D": NORM,
        "moe": {
            "w_router_DE": ROUTER,
            "router_bias_E": SELECTION,
            "experts": {"w_in_EDGF": MATRIX, "w_out_EFD": MATRIX},
            "shared": FEED_FORWARD | {"w_gate_D": MATRIX},
        },
    },
    "head": {"norm_D": NORM, "w_DV": MATRIX},
}
WITH_BIAS = dataclasses.replace(EVERYTHING, router=RouterConfig(bias=True))


def map_table(function, table, *rest):
    return jax.tree.map(function, table, *rest, is_leaf=lambda x: isinstance(x, Param))


LATENT_ATTENTION = {
    "norm_D": NORM, "w_q_down_DQ": MATRIX, "norm_q_Q": NORM, "w_q_up_QNH": MATRIX, "w_kv_down_DJ": MATRIX,
    "norm_kv_C": NORM, "w_kv_up_CNH": MATRIX, "w_o_NHD": MATRIX,
}  # fmt: skip


def test_every_parameter_is_used_as_it_should_be():
    """A new parameter needs a line here as well."""
    uses = lambda model: map_table(lambda p: (p.decay, p.compute_dtype), param_table(model, Layout()))  # noqa: E731
    assert uses(WITH_BIAS) == USES
    assert uses(LATENT)["layers"]["attention"] == LATENT_ATTENTION
    unranked = dataclasses.replace(LATENT.attention, latent=LatentConfig(16, 0, 4, 8))
    names = LATENT_ATTENTION.keys() - {"w_q_down_DQ", "norm_q_Q", "w_q_up_QNH"} | {"w_q_DNH"}
    assert uses(dataclasses.replace(LATENT, attention=unranked))["layers"]["attention"].keys() == names


def test_a_parameter_must_say_how_it_is_used():
    with pytest.raises(TypeError, match="decay"):
        Param((2,), None, ((),), compute_dtype="model")
    with pytest.raises(TypeError, match="compute_dtype"):
        Param((2,), None, ((),), decay=True)


def test_weight_decay_pulls_the_parameters_that_say_so_and_no_others():
    table = param_table(WITH_BIAS, Layout())
    params = map_table(lambda p: jnp.ones(p.shape[-1]), table)
    optimizer = make_optimizer(OptimizerConfig(warmup_steps=0), 10, table)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert map_table(lambda p, update: bool((update < 0).all()) == p.decay, table, updates) == map_table(
        lambda _: True, table
    )
    assert all((np.asarray(update) <= 0).all() for update in jax.tree.leaves(updates))


@pytest.mark.parametrize(
    "attention_config",
    [
        dataclasses.replace(WITH_BIAS.attention, num_heads=5, num_kv_heads=1, head_dim=6),
        AttentionConfig(5, 5, 10, latent=LatentConfig(17, 23, 4, 8)),
    ],
    ids=["grouped", "latent"],
)
def test_every_parameter_is_used_in_the_dtype_that_it_declares(attention_config, monkeypatch):
    """Every size differs from every other, so that a shape says whose compute copy it is."""
    model = dataclasses.replace(
        WITH_BIAS, d_model=34, d_ff=7, num_experts=9, shared_d_ff=11, attention=attention_config, dense_d_ff=13,
        vocab_size=257, dtype="bfloat16",
    )  # fmt: skip
    program = Program(model, Layout(batch_size=2), abstract_mesh(MeshConfig()))
    used, compute_copy = {}, weights.compute_copy

    def recorded(w, *args):
        copy = compute_copy(w, *args)
        used.setdefault(w.shape, set()).add(copy.dtype.name)
        return copy

    for module in (attention, embedding, experts, feed_forward, norm, moe):
        monkeypatch.setattr(module, "compute_copy", recorded)
    loss = program.sharded(program.loss, (program.param_specs, program.batch_spec), (P(), program.metric_specs))
    jax.eval_shape(loss, param_shapes(program.table, program.mesh), program.batch_shapes)
    declared = {}
    for _, p in leaves(program.table):
        if p.compute_dtype:
            dtype = model.dtype if p.compute_dtype == "model" else p.compute_dtype
            declared.setdefault(p.shape[p.num_stack_dims :], set()).add(dtype)
    assert used == declared
