"""The exchange: two hops deliver what one does, the way back inverts the way there, float8 costs what it says.

Dimensions: E experts, e of one device, n devices that exchange, C rows of a buffer, D model.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P
from moe_layer import E, K, Layer, make_tokens, make_weights

from moejax.dispatch.exchange import Exchange
from moejax.mesh import MeshConfig, build_mesh

C, D = 3, 5
ONE, PAIR = ("expert",), ("expert", "tensor")
MESHES = {
    "16x1x1": ((16, 1, 1), ONE, (1, 2, 4, 8, 16)),
    "8x1x2": ((8, 1, 2), PAIR, (1, 2, 4, 8)),
    "4x2x2": ((4, 2, 2), PAIR, (1, 2, 4)),
    "4x2x2-split": ((4, 2, 2), ONE, (1, 2, 4)),
    "2x1x8": ((2, 1, 8), PAIR, (1, 2)),
}
SUBNORMAL = float(2.0**-10 / jnp.finfo(jnp.float8_e4m3fn).max)  # half the smallest float8, of the row's largest entry


def make_exchange(axes, hosts, wire_dtype):
    return Exchange("dropless", axes, hosts, capacity=C, chunks=1, wire_dtype=wire_dtype)


@functools.cache
def compiled(sizes, axes, hosts, wire_dtype="compute"):
    """(buffers, gradient of what arrives, gradient of what returns) -> arrived, returned, and both gradients."""
    mesh = build_mesh(MeshConfig(*sizes), jax.devices()[: math.prod(sizes)])
    exchange = make_exchange(axes, hosts, wire_dtype)

    def device(buffer_ECD, d_eCD, d_ECD):
        arrived_eCD, to_experts_vjp = jax.vjp(exchange.to_experts, buffer_ECD)
        returned_ECD, to_senders_vjp = jax.vjp(exchange.to_senders, d_eCD)
        there_and_back_ECD = exchange.to_senders(arrived_eCD)
        return arrived_eCD, returned_ECD, there_and_back_ECD, to_experts_vjp(d_eCD)[0], to_senders_vjp(d_ECD)[0]

    spec = P(mesh.axis_names)
    return jax.jit(jax.shard_map(device, mesh=mesh, in_specs=spec, out_specs=spec))


@functools.cache
def buffers(sizes, axes, dtype=jnp.float32):
    """What each device sends, and gradients of what arrives [e, n C, D] and of what returns; each device's in turn."""
    devices = math.prod(sizes)
    n = sizes[0] * (sizes[2] if axes == PAIR else 1)
    rng = np.random.default_rng(0)
    shapes = (devices * E, C, D), (devices * E // n, n * C, D), (devices * E, C, D)
    return tuple(jnp.asarray(rng.standard_normal(shape, np.float32)).astype(dtype) for shape in shapes)


def by_hand(sizes, axes, sent):
    """What arrives: for each expert, the rows of every sender of its group in turn."""
    expert, pipeline, tensor = sizes
    sent = np.asarray(sent).reshape(expert, pipeline, tensor, E, C, D)
    arrived = np.zeros_like(sent).reshape(expert, pipeline, tensor, -1, D)
    n = expert * (tensor if axes == PAIR else 1)
    for i, p, t in np.ndindex(*sizes):
        number = i * tensor + t if axes == PAIR else i
        senders = [(j, u) for j in range(expert) for u in (range(tensor) if axes == PAIR else [t])]
        mine = [np.concatenate([sent[j, p, u, e] for j, u in senders]) for e in range(E)]
        arrived[i, p, t] = np.concatenate(mine[number * E // n : (number + 1) * E // n])
    return arrived.reshape(-1, n * C, D)


@pytest.mark.parametrize("mesh", MESHES)
def test_any_number_of_hops_delivers_the_same_bits(mesh):
    """Forward and gradient, there and back."""
    sizes, axes, every_hosts = MESHES[mesh]
    sent, d_eCD, d_ECD = buffers(sizes, axes)
    for hosts in every_hosts:
        arrived, returned, there_and_back, sent_gradient, returned_gradient = compiled(sizes, axes, hosts)(
            sent, d_eCD, d_ECD
        )
        np.testing.assert_array_equal(arrived, by_hand(sizes, axes, sent))
        np.testing.assert_array_equal(there_and_back, sent)
        np.testing.assert_array_equal(by_hand(sizes, axes, returned), d_eCD)
        # A permutation's gradient is the way back.
        np.testing.assert_array_equal(sent_gradient, returned)
        np.testing.assert_array_equal(returned_gradient, by_hand(sizes, axes, d_ECD))


def check_float8(actual, exact, flushed=0.0):
    """Each entry within half a unit of float8's three bits, or half its smallest step of the row's largest entry.

    What arrives is rounded once more, to the buffer's dtype.
    """
    rounding = float(jnp.finfo(exact.dtype).eps)
    actual, exact = np.asarray(actual, np.float64), np.asarray(exact, np.float64)
    largest = np.abs(exact).max(-1, keepdims=True)
    bound = np.maximum(2.0**-4 * np.abs(exact), SUBNORMAL * largest) + 2 * rounding * np.abs(exact) + flushed
    assert (np.abs(actual - exact) <= bound).all()


@pytest.mark.parametrize("hosts", [1, 2])
@pytest.mark.parametrize("mesh", ["16x1x1", "4x2x2"])
def test_float8_travels_towards_the_experts_and_nowhere_else(mesh, hosts):
    """Tokens forward and the gradients of results backward are rounded; results and tokens' gradients are not."""
    sizes, axes, _ = MESHES[mesh]
    sent, d_eCD, d_ECD = buffers(sizes, axes)
    exact = compiled(sizes, axes, 1)(sent, d_eCD, d_ECD)
    arrived, returned, _, sent_gradient, returned_gradient = compiled(sizes, axes, hosts, "float8")(sent, d_eCD, d_ECD)
    check_float8(arrived, exact[0])
    check_float8(returned_gradient, exact[4])
    assert not np.array_equal(arrived, exact[0])
    assert not np.array_equal(returned_gradient, exact[4])
    np.testing.assert_array_equal(returned, exact[1])
    np.testing.assert_array_equal(sent_gradient, exact[3])


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-44, 1e-38, 1e-37, 1e-30, 1.0, 1e30, 3e38]),
    st.sampled_from([jnp.float32, jnp.bfloat16]),
)
def test_float8_rows_keep_their_own_scale(seed, scale, dtype):
    """Rows of zeros stay zero, and no row is so small or so large that it becomes something else than itself.

    What is below float32's smallest normal number, 1.2e-38, may be flushed to zero, as processors do.
    """
    rng = np.random.default_rng(seed)
    sent = rng.uniform(-1, 1, (E, C, D)).astype(np.float32) * np.float32(scale)
    sent[0], sent[1] = 0, rng.standard_normal((C, D))
    sent = jnp.asarray(sent).astype(dtype)
    arrived, *_ = compiled((1, 1, 1), ONE, 1, "float8")(sent, sent, sent)
    assert not np.asarray(arrived[0]).any()
    assert np.isfinite(np.asarray(arrived, np.float32)).all()
    check_float8(arrived, sent, flushed=float(jnp.finfo(jnp.float32).tiny))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    sent = np.ones((E, C, D), np.float32)
    sent[2, 1, 3] = bad
    arrived = np.asarray(compiled((1, 1, 1), ONE, 1, "float8")(sent, sent, sent)[0])
    assert not np.isfinite(arrived[2, 1]).all()
    assert np.isfinite(np.delete(arrived.reshape(-1, D), 2 * C + 1, axis=0)).all()


def network_bytes(jaxpr):
    """Bytes of every all-to-all's operand."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "all_to_all":
            (x,) = equation.invars
            total += math.prod(x.aval.shape) * x.aval.dtype.itemsize
        for inner in jaxprs_in_params(equation.params):
            total += network_bytes(inner)
    return total


def gradient_bytes(send, sent_shape, arrived_shape, dtype):
    """What one device gives to the network when it sends, and when it sends the gradient back."""
    mesh = build_mesh(MeshConfig(4, 2, 2))
    spec = P(mesh.axis_names)
    program = jax.shard_map(lambda x, d: jax.vjp(send, x)[1](d)[0], mesh=mesh, in_specs=spec, out_specs=spec)
    shapes = [jax.ShapeDtypeStruct((16 * shape[0], *shape[1:]), dtype) for shape in (sent_shape, arrived_shape)]
    return network_bytes(jax.make_jaxpr(program)(*shapes).jaxpr)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("hosts", [1, 2])
def test_float8_takes_a_byte_an_entry_and_four_a_row(hosts, dtype):
    """Towards the experts, forward and backward alike; two hops send what one sends twice, the first inside a host."""
    senders_shape, experts_shape, itemsize = (E, C, D), (E // 8, 8 * C, D), jnp.dtype(dtype).itemsize
    full = E * C * D * itemsize * (2 if hosts > 1 else 1)
    for wire_dtype, ratio in (("compute", 1), ("float8", (D + 4) / (D * itemsize))):
        exchange = make_exchange(PAIR, hosts, wire_dtype)
        there = gradient_bytes(exchange.to_experts, senders_shape, experts_shape, dtype)
        back = gradient_bytes(exchange.to_senders, experts_shape, senders_shape, dtype)
        assert there == back == pytest.approx(full * (ratio + 1))


def test_the_error_of_a_layer_with_float8():
    """Root mean square, against full precision: results 3.1%, gradients 2.8% (tokens) to 4.5% (router)."""
    layer = Layer(4, 2, 2, capacity=4)
    rng = np.random.default_rng(0)
    expert_NK = np.argsort(rng.random((layer.num_tokens, E)), axis=-1)[:, :K].astype(np.int32)
    x_ND, cotangent_ND = make_tokens(layer.num_tokens)
    (full, *_), full_grads = layer.program(make_weights(), x_ND, expert_NK, cotangent_ND)
    (rounded, *_), grads = dataclasses.replace(layer, wire_dtype="float8").program(
        make_weights(), x_ND, expert_NK, cotangent_ND
    )

    def error(actual, expected):
        actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
        return np.sqrt(np.square(actual - expected).mean() / np.square(expected).mean())

    found = jax.tree.map(error, {"y": rounded, "grads": grads}, {"y": full, "grads": full_grads})
    assert found["y"] < 0.035
    assert max(jax.tree.leaves(found)) < 0.05
