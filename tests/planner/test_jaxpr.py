"""Counts of jaxprs small enough to be counted by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from moejax.kernels.manual import vary
from moejax.planner.jaxpr import OTHER, count, device_program
from moejax.planner.work import Collective
from moejax.remat import checkpoint, named

PRODUCT = 2 * 4 * 8 * 8  # FLOPs of [4, 8] × [8, 8]
SIZES = {"expert": 4, "tensor": 2}


def counted(function, *args, training=True):
    return count(jax.make_jaxpr(function)(*args).jaxpr, SIZES, training=training)


def on_mesh(function, *shapes):
    """The count of a per-device function of float32 arrays that differ from device to device."""
    device = AbstractDevice(device_kind="none", num_cores=None, platform="gpu")
    mesh = AbstractMesh(tuple(SIZES.values()), tuple(SIZES), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    spec = P(tuple(SIZES))
    whole = [jax.ShapeDtypeStruct((8 * shape[0], *shape[1:]), jnp.float32) for shape in shapes]
    sharded = jax.shard_map(function, mesh=mesh, in_specs=spec, out_specs=spec)
    return count(device_program(jax.make_jaxpr(sharded)(*whole).jaxpr), SIZES)


def layer(x, w):
    with jax.named_scope("expert"):
        return named(x @ w, "matmul")


x, w = jnp.ones((4, 8)), jnp.ones((8, 8))


def test_a_product_counts_in_the_innermost_phase():
    with_names = counted(lambda: layer(x, w))
    assert with_names.flops == {"expert": PRODUCT}
    assert with_names.moved_bytes == {"expert": 4 * (32 + 64 + 32)}
    assert with_names.flops_by_pass == {("expert", "update"): PRODUCT}
    assert counted(lambda: layer(x, w), training=False).flops_by_pass == {("expert", "forward"): PRODUCT}
    assert counted(lambda: x @ w).flops == {OTHER: PRODUCT}
    with jax.named_scope("expert"):
        assert counted(lambda: jax.named_scope("route")(lambda: x @ w)()).flops == {"route": PRODUCT}


def test_a_scan_counts_as_often_as_it_runs():
    def nested(x):
        def thrice(x, _):
            return lax.scan(lambda x, _: (layer(x, w), None), x, None, length=3)

        return lax.scan(thrice, x, None, length=5)

    assert counted(nested, x).flops == {"expert": 15 * PRODUCT}


def test_a_cond_counts_as_its_costliest_branch_and_a_while_not_at_all():
    def choose(live, x):
        return lax.cond(live, lambda x: layer(layer(x, w), w), lambda x: layer(x, w), x)

    assert counted(choose, True, x).flops == {"expert": 2 * PRODUCT}
    assert counted(lambda x: lax.while_loop(lambda x: x[0, 0] < 9, lambda x: layer(x, w), x), x).flops == {}


@pytest.mark.parametrize(("policy", "again"), [("full", 2), ("minimal", 0)])
def test_passes_are_told_apart(policy, again):
    """Of two layers the second's result is not needed again; each has two products in the backward pass."""

    def loss(w):
        def two(x, _):
            return jnp.sin(layer(jnp.sin(layer(x, w)), w)), None

        return lax.scan(checkpoint(two, policy), x, None, length=3)[0].sum()

    found = counted(jax.grad(loss), w)
    recomputed = {("expert", "recompute"): 3 * again * PRODUCT} if again else {}
    backward = 3 * 2 * 2 * PRODUCT
    assert found.flops_by_pass == {("expert", "forward"): 6 * PRODUCT, ("expert", "backward"): backward} | recomputed
    saved = {name: num_bytes for (name, *_), num_bytes in found.saved.items()}
    assert saved.get("matmul", 0) == (0 if again else 2 * 3 * 4 * 32)


COLLECTIVES = {
    "all_gather": (lambda x: lax.all_gather(x, "expert", tiled=True), ("all_gather", ("expert",), 3)),
    "all_gather over both": (
        lambda x: lax.all_gather(x, ("tensor", "expert"), tiled=True), ("all_gather", ("expert", "tensor"), 7),
    ),
    "reduce_scatter": (lambda x: lax.psum_scatter(x, "expert", tiled=True), ("reduce_scatter", ("expert",), 3 / 4)),
    "psum": (lambda x: lax.psum(x, "expert"), ("all_reduce", ("expert",), 2 * 3 / 4)),
    "pmax": (lambda x: lax.pmax(x, ("expert", "tensor")), ("all_reduce", ("expert", "tensor"), 2 * 7 / 8)),
    "ppermute": (lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), ("ppermute", ("tensor",), 1)),
    "all_to_all": (lambda x: lax.all_to_all(x, "expert", 0, 0, tiled=True), ("all_to_all", ("expert",), 3 / 4)),
    "a hop": (
        lambda x: lax.all_to_all(x, "expert", 0, 0, axis_index_groups=[[0, 1], [2, 3]], tiled=True),
        ("all_to_all", ("expert",), 1 / 2),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), COLLECTIVES.values(), ids=COLLECTIVES)
def test_collectives_send_what_a_ring_would(function, expected):
    def used(x):
        with jax.named_scope("combine"):
            y = function(x)
        return vary(y, SIZES)

    kind, axes, factor = expected
    found = on_mesh(used, (16, 8))
    assert found.operand_bytes == {("combine", kind, axes): 4 * 16 * 8}
    assert found.sent_bytes == {("combine", kind, axes): factor * 4 * 16 * 8}


def test_two_hops_are_one_transfer_of_the_planner():
    in_hosts = [[0, 1], [2, 3]], [[0, 2], [1, 3]]

    def two_hops(x):
        for groups in in_hosts:
            x = lax.all_to_all(x, "expert", 0, 0, axis_index_groups=groups, tiled=True)
        return x

    sent = on_mesh(two_hops, (16, 8)).sent_bytes[OTHER, "all_to_all", ("expert",)]
    transfer = Collective("dispatch", "forward", "all_to_all", ("expert",), 4 * 16 * 8, num_devices=4, hosts=2)
    assert sent == transfer.sent_bytes == 4 * 16 * 8
