"""Grouped matmul: every implementation against NumPy in float64, and what the CPU's must not compute.

Dims: N rows, e groups, D and F in and out.
"""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tiers import full_unless

from moejax.kernels import manual
from moejax.kernels.grouped_matmul import api, cpu, gpu, grouped_matmul, grouped_matmul_implementation, reference, tpu
from moejax.nn import experts

PASSES = ("forward", "dlhs", "drhs")


def interpreted(backend):
    """The kernels of `backend`, evaluated with plain jax operations."""
    return types.SimpleNamespace(**{p: functools.partial(getattr(backend, p), interpret=True) for p in PASSES})


BACKENDS = {"reference": reference, "cpu": cpu, "gpu": interpreted(gpu), "tpu": interpreted(tpu)}


@pytest.fixture(params=BACKENDS)
def implementation(request, monkeypatch):
    monkeypatch.setattr(api, "_backend", BACKENDS.__getitem__)
    return request.param


def make_inputs(N, D, F, sizes, *, dtype=jnp.float32, seed=0):
    """x, w, sizes and the cotangent of y."""
    rng = np.random.default_rng(seed)
    x, w, dy = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in [(N, D), (len(sizes), D, F), (N, F)])
    return x, w, jnp.asarray(sizes, jnp.int32), dy


def oracle(x, w, sizes, dy):
    """y, dx and dw, in NumPy float64, one group at a time."""
    x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
    y, dx, dw = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    start = 0
    for e, size in enumerate(np.asarray(sizes)):
        rows = slice(start, start + size)
        y[rows], dx[rows], dw[e] = x[rows] @ w[e], dy[rows] @ w[e].T, x[rows].T @ dy[rows]
        start += size
    return y, dx, dw


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(implementation, x, w, sizes, dy):
    y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation), x, w)
    return y, *vjp(dy)


def assert_close(got, want, tolerance=1e-5):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(1.0, float(np.abs(w).max(initial=0.0)))
        np.testing.assert_allclose(np.asarray(g, np.float64), w, rtol=0, atol=tolerance * scale)


@st.composite
def groups(draw):
    """(rows, sizes): among them empty groups, one that has all, and rows past the end."""
    sizes = draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 8, 9, 40, 64, 65]), min_size=1, max_size=5))
    if draw(st.booleans()):
        sizes = [sum(sizes) if i == len(sizes) // 2 else 0 for i in range(len(sizes))]
    return max(1, sum(sizes) + draw(st.sampled_from([0, 0, 1, 30]))), sizes


class TestEveryImplementation:
    @settings(max_examples=5)  # each shape is compiled anew
    @given(groups=groups(), D=st.sampled_from([1, 5, 16]), F=st.sampled_from([3, 16]), bfloat16=st.booleans())
    @pytest.mark.parametrize("name", full_unless(["reference", "cpu"].__contains__, BACKENDS))
    def test_values_and_gradients_equal_the_oracle(self, name, groups, D, F, bfloat16):
        rows, sizes = groups
        inputs = make_inputs(rows, D, F, sizes, dtype=jnp.bfloat16 if bfloat16 else jnp.float32, seed=rows)
        x, w, sizes, dy = inputs
        backend = BACKENDS[name]
        got = backend.forward(x, w, sizes), backend.dlhs(dy, w, sizes), backend.drhs(x, dy, sizes)
        assert [a.dtype for a in got] == [x.dtype] * 3
        assert_close(got, oracle(*inputs), tolerance=4e-3 if bfloat16 else 1e-5)

    def test_more_than_one_block_of_the_kernels(self, implementation):
        inputs = make_inputs(1400, 130, 300, [3, 1200, 0, 137])
        assert_close(value_and_gradients(implementation, *inputs), oracle(*inputs))

    def test_rows_past_the_end_are_not_read(self, implementation):
        x, w, sizes, dy = make_inputs(30, 8, 8, [5, 0, 12])
        want = value_and_gradients(implementation, x, w, sizes, dy)
        past = (jnp.arange(30) >= 17)[:, None]
        got = value_and_gradients(implementation, jnp.where(past, 1e3, x), w, sizes, jnp.where(past, 1e3, dy))
        jax.tree.map(np.testing.assert_array_equal, got, want)

    @pytest.mark.parametrize(
        "implementation", full_unless(lambda _: False, BACKENDS, slow=["tpu", "gpu"].__contains__), indirect=True
    )
    def test_within_shard_map_checkpoint_scan_and_cond(self, implementation):
        """Rows over 16 devices, one matrix for every pair of them, and loops that turn differently on each."""
        mesh = jax.make_mesh((8, 2), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2)
        x, w, _, _ = make_inputs(16 * 20, 8, 8, [0] * 16)
        sizes = jnp.asarray(np.random.default_rng(1).integers(0, 10, (16, 2)), jnp.int32)

        def layers(implementation, x, w, sizes):
            layer = jax.checkpoint(lambda x: jnp.sin(grouped_matmul(x, w, sizes, implementation=implementation)))
            some = jnp.where(sizes[0] > 2, 1, 0)
            x, _ = jax.lax.scan(lambda x, _: (jax.lax.cond(some == 1, layer, jnp.cos, x), None), x, None, length=2)
            return (x**2).sum()

        def per_device(x, w, sizes):
            w = manual.vary(w, ["tensor"])  # out here: its gradient is summed, and inside the cond not all would join
            return jax.lax.psum(layers(implementation, x, w, sizes[0]), ("expert", "tensor"))

        rows = P(("expert", "tensor"))
        sharded = jax.shard_map(per_device, mesh=mesh, in_specs=(rows, P("expert"), rows), out_specs=P())
        got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(x, w, sizes)

        def one_by_one(x, w):
            devices = zip(x.reshape(16, 20, 8), jnp.repeat(w.reshape(8, 2, 8, 8), 2, axis=0), sizes, strict=True)
            return sum(layers("reference", *device) for device in devices)

        assert_close(got, jax.value_and_grad(one_by_one, argnums=(0, 1))(x, w))


@pytest.mark.parametrize("sizes", [[64] * 16, [1024] + [0] * 15, [520, 3, 1, 500, *[0] * 12], [0] * 16, [1000]])
def test_cpu_computes_the_rows_that_there_are_however_many_groups(sizes, monkeypatch):
    """Counts the rows of every product that runs: each is one FLOP a row and element of one group's matrix."""
    products = []
    dot = cpu._dot

    def counted(a, b, a_dim, b_dim):
        rows = a.shape[0]
        jax.debug.callback(lambda: products.append(rows))
        return dot(a, b, a_dim, b_dim)

    monkeypatch.setattr(cpu, "_dot", counted)
    monkeypatch.setattr(cpu, "_SMALL_GROUP", 0)  # gradients by group; the others are counted below
    x, w, group_sizes_e, dy = make_inputs(1024, 4, 4, sizes)
    used = sum(size > 0 for size in sizes)
    largest, smallest = cpu._block_sizes(1024, len(sizes))
    for run, waste in [
        (lambda: cpu.forward(x, w, group_sizes_e), smallest),
        (lambda: cpu.dlhs(dy, w, group_sizes_e), smallest),
        (lambda: cpu.drhs(x, dy, group_sizes_e), 2 * smallest),
    ]:
        products.clear()
        jax.block_until_ready(run())
        jax.effects_barrier()
        assert sum(sizes) <= sum(products) < sum(sizes) + max(1, used * waste)
        assert len(products) <= sum(sizes) // largest + 4 * used


@pytest.mark.parametrize("sizes", [[64] * 16, [80] * 8 + [40] * 8, [128] * 8, [1024] + [0] * 15, [0] * 16])
def test_gradients_of_small_groups_are_batched_or_taken_by_group(sizes, monkeypatch):
    """Whichever it is, they are the same, and a batched product has at most twice the rows that there are."""
    x, _, group_sizes_e, dy = make_inputs(1024, 4, 4, sizes)
    found = cpu.drhs(x, dy, group_sizes_e)
    np.testing.assert_allclose(found, reference.drhs(x, dy, group_sizes_e), rtol=1e-5, atol=1e-5)
    products = [
        eqn for eqn in equations(jax.make_jaxpr(cpu.drhs)(x, dy, group_sizes_e)) if eqn.primitive.name == "dot_general"
    ]
    batched = [eqn.invars[0].aval.shape for eqn in products if len(eqn.invars[0].aval.shape) == 3]
    assert sorted(shape[0] * shape[1] for shape in batched) == [1280, 2048]
    monkeypatch.setattr(cpu, "_SMALL_GROUP", 0)
    np.testing.assert_allclose(found, cpu.drhs(x, dy, group_sizes_e), rtol=1e-5, atol=1e-5)


def equations(jaxpr):
    """All of a jaxpr's, those inside of others as well."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def test_grouped_experts_equal_whole_experts_on_equal_sizes_and_give_zeros_past_the_end():
    rng = np.random.default_rng(0)
    p = {
        "w_in_EDGF": jnp.asarray(rng.standard_normal((3, 8, 2, 5)), jnp.float32),
        "w_out_EFD": jnp.asarray(rng.standard_normal((3, 5, 8)), jnp.float32),
    }
    x_ECD = jnp.asarray(rng.standard_normal((3, 7, 8)), jnp.float32)

    def grouped(p, x_ECD):
        x_ND = jnp.pad(x_ECD.reshape(21, 8), ((0, 4), (0, 0)), constant_values=9)
        y_ND = experts.grouped_experts(p, x_ND, jnp.full(3, 7, jnp.int32))
        return y_ND[:21].reshape(x_ECD.shape), y_ND[21:]

    (got, past), vjp = jax.vjp(grouped, p, x_ECD)
    want, vjp_whole = jax.vjp(experts.whole_experts, p, x_ECD)
    assert_close(got, want)
    np.testing.assert_array_equal(past, 0)
    assert_close(vjp((jnp.cos(want), jnp.ones_like(past))), vjp_whole(jnp.cos(want)))


KERNELS = {"cpu": set(), "cuda": {"__gpu$xla.gpu.triton"}, "tpu": {"tpu_custom_call"}}
DEVICE_KINDS = {"cpu": "cpu", "cuda": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5p"}


@pytest.mark.parametrize("platform", KERNELS)
def test_the_mesh_picks_the_implementation_which_the_lowered_program_then_holds(platform):
    device = AbstractDevice(DEVICE_KINDS[platform], None, platform)
    mesh = AbstractMesh((2,), ("expert",), axis_types=(AxisType.Auto,), abstract_device=device)
    x, w, sizes, _ = make_inputs(256, 128, 256, [10, 20, 30, 40], dtype=jnp.bfloat16)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P("expert"))) for a in (x, w, sizes)]
    picked = []

    def per_device(*args):
        picked.extend(grouped_matmul_implementation(None, p) for p in PASSES)
        return jax.lax.psum(grouped_matmul(*args).sum(), "expert")

    sharded = jax.shard_map(per_device, mesh=mesh, in_specs=(P("expert"),) * 3, out_specs=P())
    traced = jax.jit(jax.grad(sharded, argnums=(0, 1))).trace(*args)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert set(picked) == {grouped_matmul_implementation(platform, p) for p in PASSES}
    kernels = {name for names in KERNELS.values() for name in names if f"@{name}" in lowered}
    assert kernels == KERNELS[platform]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((6, 4, 1))}, r"x_ND has shape \(6, 4, 1\); must be \[rows, D\]"),
        ({"w": jnp.ones((2, 5, 3))}, r"w_eDF has shape \(2, 5, 3\); must be \(groups, 4, F\)"),
        ({"size": jnp.ones(3, jnp.int32)}, r"group_sizes_e has shape \(3,\); must be \(2,\)"),
        ({"size": jnp.ones(2)}, "group_sizes_e has dtype float32; must be int32"),
        ({"w": jnp.ones((2, 4, 3), jnp.bfloat16)}, "dtypes float32 and bfloat16; must be one floating"),
        ({"implementation": "triton"}, "implementation='triton' must be one of 'reference', 'cpu', 'gpu', 'tpu'"),
    ],
)
def test_errors_name_what_would_be_right(change, message):
    args = {"x": jnp.ones((6, 4)), "w": jnp.ones((2, 4, 3)), "size": jnp.ones(2, jnp.int32), "implementation": None}
    args |= change
    with pytest.raises(ValueError, match=message):
        grouped_matmul(args["x"], args["w"], args["size"], implementation=args["implementation"])


def test_an_unknown_platform_or_pass_is_refused():
    with pytest.raises(ValueError, match="platform='rocm' has no grouped matmul; use 'cpu', 'cuda', 'gpu', 'tpu'"):
        grouped_matmul_implementation("rocm")
    with pytest.raises(ValueError, match="pass_='backward' must be one of 'forward', 'dlhs', 'drhs'"):
        grouped_matmul_implementation("cpu", "backward")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "plugin"), [("cuda", "jax_plugins.xla_cuda13"), ("tpu", "libtpu")])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_compiles_ahead_of_time_for_devices_that_are_not_there(target, plugin, dtype):
    found = None
    with contextlib.suppress(ModuleNotFoundError):  # of the package that the plugin would be in
        found = importlib.util.find_spec(plugin)
    assert found, f"{plugin} is missing, which compiles for {target} on any machine; pip install 'moejax[aot]'"
    here = Path(__file__).parent
    script = [sys.executable, here / "grouped_matmul_ahead_of_time.py", target, dtype]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["implementations"] == [grouped_matmul_implementation(target, p) for p in PASSES]
    assert {name for name, count in report["kernels"].items() if count} == KERNELS[target]
    assert sum(report["kernels"].values()) == len(PASSES)
    assert report["dots"] == 0
    assert report["peak_bytes"] < 1e9
