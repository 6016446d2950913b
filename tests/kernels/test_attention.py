"""Attention: every implementation against a dense float64 oracle, and what no implementation may do.

Dims: B batch, S sequence, N query heads, K key-value heads, G = N // K, H head_dim.
"""

import contextlib
import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
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

from moejax.kernels.attention import attention, attention_implementation, gpu, reference, tpu

IMPLEMENTATIONS = {
    "reference": functools.partial(reference.attention, chunk=16),
    "gpu": functools.partial(gpu.attention, interpret=True),
    "tpu": functools.partial(tpu.attention, interpret=True),
}


def make_inputs(B, S, N, K, H, *, segments=3, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((B, S, heads, H)), dtype) for heads in (N, K, K))
    return q, k, v, jnp.asarray(np.sort(rng.integers(0, segments, (B, S)), axis=1), jnp.int32)


def dense(q_BSNH, k_BSKH, v_BSKH, segment_ids_BS, do_BSNH):
    """The output and the gradients for `do`, in numpy float64, one head and one row at a time."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q_BSNH, k_BSKH, v_BSKH, do_BSNH))
    segment_ids = np.asarray(segment_ids_BS)
    o, dq, dk, dv = (np.zeros_like(x) for x in (q, q, k, v))
    group, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    for b, n in np.ndindex(q.shape[0], q.shape[2]):
        here, there = (b, slice(None), n), (b, slice(None), n // group)
        seen = np.tril(segment_ids[b][:, None] == segment_ids[b][None, :])
        weights = np.where(seen, np.exp(q[here] @ k[there].T * scale), 0.0)
        weights /= weights.sum(1, keepdims=True)
        o[here] = weights @ v[there]
        dweights = do[here] @ v[there].T
        dlogits = scale * weights * (dweights - (weights * dweights).sum(1, keepdims=True))
        dq[here] += dlogits @ k[there]
        dk[there] += dlogits.T @ q[here]
        dv[there] += weights.T @ do[here]
    return o, (dq, dk, dv)


def output_and_gradients(attend, q, k, v, segment_ids, do):
    o, vjp = jax.vjp(lambda q, k, v: attend(q, k, v, segment_ids), q, k, v)
    return o, vjp(do)


def assert_close(got, want, tolerance=1e-5):
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance), got, want)


@pytest.fixture(params=IMPLEMENTATIONS)
def attend(request):
    return jax.jit(IMPLEMENTATIONS[request.param])


@st.composite
def shapes(draw):
    """(B, S, N, K, H), among them rows of one token, of one block, and of no whole number of blocks."""
    K, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return draw(st.integers(1, 2)), draw(st.integers(1, 50)), K * group, K, draw(st.sampled_from([4, 8, 20]))


class TestEveryImplementation:
    @pytest.mark.parametrize("name", full_unless("reference".__eq__, IMPLEMENTATIONS))
    @settings(max_examples=4)  # each shape is compiled anew
    @given(shape=shapes(), segments=st.integers(1, 5), contiguous=st.booleans(), seed=st.integers(0, 99))
    def test_values_and_gradients_equal_the_dense_oracle(self, name, shape, segments, contiguous, seed):
        *qkv, segment_ids = make_inputs(*shape, segments=segments, seed=seed)
        if not contiguous:
            segment_ids = segment_ids[:, np.random.default_rng(seed).permutation(shape[1])]
        do = jnp.cos(qkv[0])
        got = jax.jit(functools.partial(output_and_gradients, IMPLEMENTATIONS[name]))(*qkv, segment_ids, do)
        assert_close(got, dense(*qkv, segment_ids, do))

    def test_more_than_one_block_of_the_kernels(self, attend):
        *qkv, segment_ids = make_inputs(1, 300, 2, 1, 16)
        do = jnp.cos(qkv[0])
        got = output_and_gradients(attend, *qkv, segment_ids, do)
        assert_close(got, dense(*qkv, segment_ids, do))

    def test_bfloat16_in_bfloat16_out_float32_between(self, attend):
        *qkv, segment_ids = make_inputs(2, 33, 4, 2, 8, dtype=jnp.bfloat16)
        do = jnp.ones_like(qkv[0])
        o, grads = output_and_gradients(attend, *qkv, segment_ids, do)
        assert [x.dtype for x in (o, *grads)] == [jnp.bfloat16] * 4
        want = dense(*(np.asarray(x.astype(jnp.float32)) for x in qkv), segment_ids, np.ones(o.shape))
        assert_close(jax.tree.map(lambda x: x.astype(jnp.float32), (o, grads)), want, tolerance=0.04)

    def test_another_segment_changes_nothing(self, attend):
        q, k, v, _ = make_inputs(1, 40, 2, 1, 8)
        segment_ids = jnp.asarray([[0] * 13 + [1] * 20 + [2] * 7], jnp.int32)
        before = attend(q, k, v, segment_ids)
        mine = (segment_ids == 1)[:, :, None, None]
        after = attend(*(jnp.where(mine, x, 3 - 2 * x) for x in (q, k, v)), segment_ids)
        np.testing.assert_array_equal(before[:, 13:33], after[:, 13:33])
        assert (before[:, :13] != after[:, :13]).any()

    def test_the_future_changes_nothing(self, attend):
        q, k, v, segment_ids = make_inputs(1, 40, 2, 1, 8, segments=1)
        before = attend(q, k, v, segment_ids)
        past = (jnp.arange(40) < 25)[None, :, None, None]
        after = attend(*(jnp.where(past, x, 3 - 2 * x) for x in (q, k, v)), segment_ids)
        np.testing.assert_array_equal(before[:, :25], after[:, :25])
        assert (before[:, 25:] != after[:, 25:]).any()

    @pytest.mark.parametrize(
        "attend", full_unless("reference".__eq__, IMPLEMENTATIONS, slow=["tpu"].__contains__), indirect=True
    )
    def test_within_shard_map_checkpoint_and_scan(self, attend):
        """Heads over `tensor`, the batch over `expert` and `pipeline`, k and v stored alike on all of `pipeline`."""
        mesh = jax.make_mesh((2, 2, 2), ("expert", "pipeline", "tensor"), axis_types=(AxisType.Auto,) * 3)
        q, k, v, segment_ids = make_inputs(4, 20, 4, 2, 8)
        q_specs, k_specs = P(("expert", "pipeline"), None, "tensor"), P("expert", None, "tensor")

        def loss(attend, q, k, v, segment_ids):
            layer = jax.checkpoint(lambda q: jnp.sin(attend(q, k, v, segment_ids)))
            q, _ = jax.lax.scan(lambda q, _: (layer(q), None), q, None, length=2)
            return (q**2).sum()

        def per_device(q, k, v, segment_ids):
            part = jax.lax.axis_index("pipeline") * q.shape[0]
            k, v, segment_ids = (jax.lax.dynamic_slice_in_dim(x, part, q.shape[0]) for x in (k, v, segment_ids))
            return jax.lax.psum(loss(attend, q, k, v, segment_ids), ("expert", "pipeline", "tensor"))

        in_specs = (q_specs, k_specs, k_specs, P("expert"))
        sharded = jax.shard_map(per_device, mesh=mesh, in_specs=in_specs, out_specs=P())
        got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1, 2)))(q, k, v, segment_ids)
        plain = functools.partial(loss, reference.attention)
        assert_close(got, jax.value_and_grad(plain, argnums=(0, 1, 2))(q, k, v, segment_ids))

    @pytest.mark.parametrize("name", IMPLEMENTATIONS)
    def test_a_policy_that_saves_attention_out_spares_the_second_forward_pass(self, name):
        *qkv, segment_ids = make_inputs(1, 40, 2, 1, 8)
        passes = {}
        for saved in ["attention_out", "something_else"]:
            policy = jax.checkpoint_policies.save_only_these_names(saved)
            layer = jax.checkpoint(lambda *qkv: IMPLEMENTATIONS[name](*qkv, segment_ids).sum(), policy=policy)
            jaxpr = jax.make_jaxpr(jax.grad(layer, argnums=(0, 1, 2)))(*qkv).jaxpr
            kernel = "scan" if name == "reference" else "pallas_call"
            passes[saved] = sum(eqn.primitive.name == kernel for eqn in equations(jaxpr))
        assert passes["something_else"] == passes["attention_out"] + 1


def equations(jaxpr):
    """The equations of `jaxpr` and of the jaxprs inside it, but not those of a kernel's body."""
    for eqn in jaxpr.eqns:
        yield eqn
        if eqn.primitive.name != "pallas_call":
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("name", ["reference", "gpu", "tpu"])
def test_nothing_grows_with_the_square_of_the_sequence(name):
    S = 2048
    *qkv, segment_ids = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in make_inputs(1, S, 2, 1, 8))
    attend = {
        "reference": functools.partial(reference.attention, chunk=512),
        "gpu": gpu.attention,
        "tpu": tpu.attention,
    }
    grads = jax.grad(lambda *args: attend[name](*args).sum(), argnums=(0, 1, 2))
    shapes = [v.aval.shape for eqn in equations(jax.make_jaxpr(grads)(*qkv, segment_ids).jaxpr) for v in eqn.outvars]
    assert len(shapes) > 20
    assert not [shape for shape in shapes if sum(d >= S for d in shape) > 1]


KERNELS = {"cpu": set(), "cuda": {"__gpu$xla.gpu.triton"}, "tpu": {"tpu_custom_call"}}
DEVICE_KINDS = {"cpu": "cpu", "cuda": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5p"}


@pytest.mark.parametrize("platform", KERNELS)
def test_the_mesh_picks_the_implementation_which_the_lowered_program_then_holds(platform):
    device = AbstractDevice(DEVICE_KINDS[platform], None, platform)
    mesh = AbstractMesh((2, 2), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    specs = (P("expert", None, "tensor"),) * 3 + (P("expert"),)
    args = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        for x, spec in zip(make_inputs(2, 128, 4, 2, 128, dtype=jnp.bfloat16), specs, strict=True)
    ]
    picked = []

    def per_device(*args):
        picked.append(attention_implementation())
        return jax.lax.psum(attention(*args).sum(), ("expert", "tensor"))

    sharded = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=P())
    traced = jax.jit(jax.grad(sharded, argnums=(0, 1, 2))).trace(*args)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert set(picked) == {attention_implementation(platform)}
    assert set(re.findall(r"custom_call @(__gpu[$.\w]+|tpu_custom_call)", lowered)) == KERNELS[platform]


def test_outside_a_mesh_the_default_backend_picks():
    assert jax.default_backend() == "cpu"
    assert attention_implementation() == "reference"
    inputs = make_inputs(1, 9, 2, 1, 4)
    np.testing.assert_array_equal(attention(*inputs), attention(*inputs, implementation="reference"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": jnp.ones((2, 8, 12))}, r"q_BSNH has shape \(2, 8, 12\); must be \[batch, sequence, heads, head_dim\]"),
        ({"k": jnp.ones((2, 9, 2, 4))}, r"k_BSKH has shape \(2, 9, 2, 4\); must be \(2, 8, kv_heads, 4\)"),
        ({"v": jnp.ones((2, 8, 1, 4))}, r"v_BSKH has shape \(2, 8, 1, 4\); must be k's \(2, 8, 2, 4\)"),
        ({"q": jnp.ones((2, 8, 3, 4))}, r"num_heads=3 must be a multiple of num_kv_heads=2; use one of \[1, 3\]"),
        ({"segment_ids": jnp.ones((2, 7), jnp.int32)}, r"segment_ids_BS has shape \(2, 7\); must be \(2, 8\)"),
        ({"segment_ids": jnp.ones((2, 8))}, "segment_ids_BS has dtype float32; must be an integer"),
        ({"q": jnp.ones((2, 8, 4, 4), jnp.bfloat16)}, "dtypes bfloat16, float32, float32; must be one floating"),
        ({"implementation": "cudnn"}, "implementation='cudnn' must be one of 'reference', 'gpu', 'tpu'"),
    ],
)
def test_errors_name_what_would_be_right(change, message):
    q, k, v, segment_ids = make_inputs(2, 8, 4, 2, 4)
    args = {"q": q, "k": k, "v": v, "segment_ids": segment_ids, "implementation": None} | change
    with pytest.raises(ValueError, match=message):
        attention(*(args[x] for x in ("q", "k", "v", "segment_ids")), implementation=args["implementation"])


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="platform='rocm' has no attention; use 'cpu', 'cuda', 'gpu', 'tpu'"):
        attention_implementation("rocm")


@pytest.mark.slow
@pytest.mark.parametrize(("target", "plugin"), [("cuda", "jax_plugins.xla_cuda13"), ("tpu", "libtpu")])
@pytest.mark.parametrize("sequence", [100, 10_240])
def test_compiles_ahead_of_time_for_devices_that_are_not_there(target, plugin, sequence):
    found = None
    with contextlib.suppress(ModuleNotFoundError):  # of the package that the plugin would be in
        found = importlib.util.find_spec(plugin)
    assert found, f"{plugin} is missing, which compiles for {target} on any machine; pip install 'moejax[aot]'"
    here = Path(__file__).parent
    script = [sys.executable, here / "attention_ahead_of_time.py", target, str(sequence)]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["implementation"] == attention_implementation(target)
    assert set(report["kernels"]) >= KERNELS[target]
    assert report["peak_bytes"] < 1e9
