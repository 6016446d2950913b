"""Routing: every implementation against a float64 oracle, one token at a time, and what no implementation may do.

Dims: T tokens, K experts a token, E experts, D model, b sequences.
"""

import functools
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

from moejax.kernels.top_k_routing import Routing, RoutingSums, route_tokens, routing_implementation, top_k_routing

IMPLEMENTATIONS = ["reference", "pallas_gpu", "pallas_tpu"]


@pytest.fixture(params=IMPLEMENTATIONS)
def options(request):
    return {"implementation": request.param, "interpret": request.param != "reference"}


def in_best_groups(value_E, num_groups, groups_per_token, biased):
    """Which experts are in the groups whose two best values, or best one without a bias, have the highest sum."""
    value_GE = value_E.reshape(num_groups, -1)
    total_G = np.sort(value_GE, axis=1)[:, -2 if biased else -1 :].sum(1)
    best = np.argsort(-total_G, kind="stable")[:groups_per_token]
    return np.isin(np.arange(num_groups), best).repeat(value_GE.shape[1])


def oracle(
    logits_TE, bias_E, cotangents, *, experts_per_token, score="softmax", renormalize=True, num_sequences=1,
    num_groups=1, groups_per_token=1,
):  # fmt: skip
    """Routing, sums and the gradient of the logits for cotangents (gate_TK, prob_bE, z), in numpy float64."""
    logits_TE, (dgate_TK, dprob_bE, dz) = np.asarray(logits_TE, np.float64), cotangents
    (T, E), K, b = logits_TE.shape, experts_per_token, num_sequences
    routing = Routing(np.zeros((T, K)), np.full((T, K), E), np.zeros((T, K), int))
    count_bE, prob_bE, z, entropy, invalid = np.zeros((b, E)), np.zeros((b, E)), 0.0, 0.0, 0
    dlogits_TE, seen_E = np.zeros((T, E)), np.zeros(E, int)
    for t, logits_E in enumerate(logits_TE):
        if not np.isfinite(logits_E).all():
            invalid += 1
            continue
        i, log_z = t // (T // b), np.logaddexp.reduce(logits_E)
        softmax_E = np.exp(logits_E - log_z)
        score_E = softmax_E if score == "softmax" else 1 / (1 + np.exp(-logits_E))
        slope_EE = np.diag(score_E) - np.outer(score_E, score_E)  # d score / d logits
        if score == "sigmoid":
            slope_EE = np.diag(score_E * (1 - score_E))
        value_E = score_E if bias_E is None else score_E + bias_E
        value_E = np.where(in_best_groups(value_E, num_groups, groups_per_token, bias_E is not None), value_E, -np.inf)
        chosen_K = np.argsort(-value_E, kind="stable")[:K]
        share = score_E[chosen_K].sum() if renormalize else 1.0
        gate_K, p_E = score_E[chosen_K] / share, score_E / score_E.sum()

        dscore_E = (dprob_bE[i] - p_E @ dprob_bE[i]) / score_E.sum()
        dscore_E[chosen_K] += (dgate_TK[t] - (gate_K @ dgate_TK[t] if renormalize else 0)) / share
        dlogits_TE[t] = slope_EE @ dscore_E + 2 * dz * log_z * softmax_E
        routing.gate_TK[t], routing.expert_TK[t], routing.position_TK[t] = gate_K, chosen_K, seen_E[chosen_K]
        seen_E[chosen_K] += 1
        count_bE[i, chosen_K] += 1
        prob_bE[i] += p_E
        z, entropy = z + log_z**2, entropy - (p_E * np.log(p_E)).sum()
    return (routing, RoutingSums(count_bE, prob_bE, z, entropy, invalid)), dlogits_TE


def run(route, inputs, bias_E, cotangents):
    """Routing, sums and the gradients of the inputs. Counts, entropy and invalid get a cotangent too, to no effect."""

    def differentiable(*inputs):
        routing, sums = route(*inputs, bias_E)
        return (routing.gate_TK, *sums), (routing, sums)

    out, pull_back, result = jax.vjp(differentiable, *inputs, has_aux=True)
    dgate_TK, dprob_bE, dz = (jnp.asarray(x, jnp.float32) for x in cotangents)
    return result, pull_back((dgate_TK, jnp.ones_like(out[1]), dprob_bE, dz, *(jnp.ones_like(x) for x in out[4:])))


def make_cotangents(T, E, K, b, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((T, K)), rng.standard_normal((b, E)), 0.1 * rng.standard_normal()


def assert_close(got, want, tolerance=1e-5):
    def close(g, w):
        np.testing.assert_allclose(g, w, rtol=tolerance, atol=tolerance * max(1.0, np.abs(w).max()))

    jax.tree.map(close, got, want)


def assert_types(result, T, E, K, b):
    routing, sums = result
    assert [(x.shape, x.dtype) for x in routing] == [((T, K), t) for t in (jnp.float32, jnp.int32, jnp.int32)]
    assert [x.shape for x in sums] == [(b, E), (b, E), (), (), ()]
    assert {x.dtype for x in sums} == {jnp.dtype(jnp.float32)}


LOGITS = {
    "normal": lambda rng, T, E: rng.standard_normal((T, E)),
    "ties": lambda rng, T, E: rng.integers(-1, 2, (T, E)),
    "equal": lambda rng, T, E: np.full((T, E), 0.5),
    "skewed": lambda rng, T, E: rng.standard_normal((T, E)) + 9 * (np.arange(E) == E // 2),
}


@st.composite
def cases(draw):
    """(T, E, rules, kind of logits, biased, share of broken tokens): also one token, and no whole number of tiles."""
    E, b = draw(st.sampled_from([8, 12, 16, 40])), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    visited = draw(st.integers(1, groups))
    rules = {
        "experts_per_token": draw(st.integers(1, min(8, visited * E // groups))),
        "num_groups": groups,
        "groups_per_token": visited,
        "score": draw(st.sampled_from(["softmax", "sigmoid"])),
        "renormalize": draw(st.booleans()),
        "num_sequences": b,
    }
    kind, broken = draw(st.sampled_from(sorted(LOGITS))), draw(st.sampled_from([0.0, 0.2, 1.0]))
    return b * draw(st.sampled_from([1, 7, 64, 100])), E, rules, kind, draw(st.booleans()), broken


class TestEveryImplementation:
    @pytest.mark.parametrize("implementation", full_unless("reference".__eq__, IMPLEMENTATIONS))
    @settings(max_examples=6)  # each is compiled anew
    @given(case=cases(), seed=st.integers(0, 99))
    def test_values_and_gradients_equal_the_oracle(self, implementation, case, seed):
        T, E, rules, kind, biased, broken = case
        rng = np.random.default_rng(seed)
        logits_TE = LOGITS[kind](rng, T, E).astype(np.float32)
        rows = rng.random(T) < broken
        logits_TE[rows, rng.integers(E)] = rng.choice([np.nan, np.inf, -np.inf], rows.sum())
        bias_E = rng.standard_normal(E).astype(np.float32) if biased else None
        cotangents = make_cotangents(T, E, rules["experts_per_token"], rules["num_sequences"], seed)
        route = functools.partial(
            top_k_routing, implementation=implementation, interpret=implementation != "reference", **rules
        )
        result, (dlogits_TE,) = jax.jit(functools.partial(run, route))((logits_TE,), bias_E, cotangents)
        assert_types(result, T, E, rules["experts_per_token"], rules["num_sequences"])
        assert_close((result, dlogits_TE), oracle(logits_TE, bias_E, cotangents, **rules))

    @pytest.mark.parametrize(("score", "dtypes"), [("softmax", "ff"), ("sigmoid", "hf"), ("softmax", "hh")])
    def test_tokens_times_weights_equal_the_oracle(self, options, score, dtypes):
        T, D, E, K = 45, 24, 12, 3
        rng = np.random.default_rng(1)
        dtypes = [{"f": jnp.float32, "h": jnp.bfloat16}[letter] for letter in dtypes]
        x_TD = jnp.asarray(rng.standard_normal((T, D)), dtypes[0]).at[5].set(1e38)  # a token whose logits overflow
        w_DE = jnp.asarray(rng.standard_normal((D, E)), dtypes[1])
        cotangents = make_cotangents(T, E, K, 1)
        route = functools.partial(route_tokens, experts_per_token=K, score=score, **options)
        result, grads = jax.jit(functools.partial(run, route))((x_TD, w_DE), None, cotangents)
        x, w = (np.asarray(a.astype(jnp.float32), np.float64) for a in (x_TD, w_DE))
        logits_TE = np.where(np.abs(x @ w) < 3.4e38, x @ w, np.nan)
        assert np.isnan(logits_TE[5]).any()
        want, dlogits_TE = oracle(logits_TE, None, cotangents, experts_per_token=K, score=score)
        assert_types(result, T, E, K, 1)
        assert_close(result, want)
        assert [g.dtype for g in grads] == dtypes
        for got, want_grad in zip(grads, (dlogits_TE @ w.T, x.T @ dlogits_TE), strict=True):
            assert_close(got.astype(jnp.float32), want_grad, 1e-5 if got.dtype == jnp.float32 else 0.01)

    @pytest.mark.parametrize("b", [1, 2])
    def test_positions_go_on_from_tile_to_tile(self, options, b):
        T, E, K = 1300, 16, 2
        logits_TE = np.random.default_rng(0).standard_normal((T, E)).astype(np.float32)
        rules = {"experts_per_token": K, "num_sequences": b}
        got = jax.jit(functools.partial(top_k_routing, **rules, **options))(logits_TE)
        assert_close(got, oracle(logits_TE, None, make_cotangents(T, E, K, b), **rules)[0])

    def test_ties_go_to_the_lower_expert_also_with_a_bias(self, options):
        logits_TE = jnp.zeros((9, 8)).at[:, 5].set(1.0)
        for bias_E in (None, jnp.zeros(8)):
            routing, _ = jax.jit(functools.partial(top_k_routing, experts_per_token=3, **options))(logits_TE, bias_E)
            np.testing.assert_array_equal(routing.expert_TK, [[5, 0, 1]] * 9)
            np.testing.assert_array_equal(routing.position_TK, np.arange(9)[:, None].repeat(3, 1))

    @pytest.mark.parametrize("biased", [False, True])
    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_a_token_visits_its_best_groups_alone(self, options, score, biased):
        T, E, K = 70, 24, 4
        rng = np.random.default_rng(0)
        logits_TE = rng.standard_normal((T, E)).astype(np.float32)
        bias_E = rng.standard_normal(E).astype(np.float32) if biased else None
        rules = {"experts_per_token": K, "score": score, "num_groups": 6, "groups_per_token": 2}
        cotangents = make_cotangents(T, E, K, 1)
        route = functools.partial(top_k_routing, **rules, **options)
        result, (dlogits_TE,) = jax.jit(functools.partial(run, route))((logits_TE,), bias_E, cotangents)
        assert_close((result, dlogits_TE), oracle(logits_TE, bias_E, cotangents, **rules))
        visited = [len(set(experts)) for experts in np.asarray(result[0].expert_TK) // 4]
        assert max(visited) == 2
        free, _ = jax.jit(functools.partial(top_k_routing, experts_per_token=K, score=score, **options))(
            logits_TE, bias_E
        )
        assert (np.asarray(free.expert_TK) != np.asarray(result[0].expert_TK)).any(1).mean() > 0.5

    def test_ties_go_to_the_lower_group(self, options):
        route = functools.partial(top_k_routing, experts_per_token=3, num_groups=4, groups_per_token=2, **options)
        for bias_E in (None, jnp.zeros(8)):
            routing, _ = jax.jit(route)(jnp.zeros((9, 8)).at[:, 5].set(1.0), bias_E)
            np.testing.assert_array_equal(routing.expert_TK, [[5, 0, 1]] * 9)

    @pytest.mark.parametrize("score", ["softmax", "sigmoid"])
    def test_scores_that_underflow_and_the_largest_logits_give_finite_gates(self, options, score):
        logits_TE = jnp.asarray([[-200.0] * 8, [3e38] + [-3e38] * 7, [0.0] * 7 + [300.0]])
        bias_E = 10 * jnp.arange(8.0)  # selects experts 7 and 6, whatever their scores
        route = functools.partial(top_k_routing, experts_per_token=2, score=score, **options)
        cotangents = np.ones((3, 2)), np.ones((1, 8)), 0.0
        (routing, sums), (dlogits_TE,) = jax.jit(functools.partial(run, route))((logits_TE,), bias_E, cotangents)
        np.testing.assert_array_equal(routing.expert_TK, [[7, 6]] * 3)
        assert_close(routing.gate_TK, [[0.5, 0.5], [0.5, 0.5], [1, 0] if score == "softmax" else [2 / 3, 1 / 3]])
        assert jnp.isfinite(sums.entropy)
        assert jnp.isfinite(dlogits_TE).all()

    def test_the_bias_gets_no_gradient(self, options):
        def loss(bias_E):
            routing, sums = top_k_routing(jnp.ones((4, 8)), bias_E, experts_per_token=2, **options)
            return routing.gate_TK.sum() + sums.prob_bE[0, 0] + sums.z

        np.testing.assert_array_equal(jax.jit(jax.grad(loss))(jnp.arange(8.0)), np.zeros(8))

    @pytest.mark.parametrize("options", full_unless("reference".__eq__, IMPLEMENTATIONS), indirect=True)
    def test_within_shard_map_checkpoint_and_scan(self, options):
        """Tokens over `expert` and `pipeline`, weights alike on all; a gradient that autodiff sums over both."""
        mesh = jax.make_mesh((2, 2, 2), ("expert", "pipeline", "tensor"), axis_types=(AxisType.Auto,) * 3)
        rng = np.random.default_rng(0)
        x_TD, w_DE = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((4 * 18, 8), (8, 8)))
        rows = P(("expert", "pipeline"))

        def loss(options, x_TD, w_DE, bias_E):
            def layer(x_TD, _):
                routing, sums = route_tokens(x_TD, w_DE, bias_E, experts_per_token=2, num_sequences=2, **options)
                angle_TK = (2 * routing.position_TK + routing.expert_TK).astype(jnp.float32)
                scale_T = (routing.gate_TK * jnp.cos(angle_TK)).sum(1)
                return x_TD * scale_T[:, None], (sums.z, (sums.prob_bE**2).sum())

            x_TD, sums = jax.lax.scan(jax.checkpoint(layer), x_TD, None, length=2)
            return (x_TD**2).sum() + sum(x.sum() for x in sums)

        def per_device(*args):
            return jax.lax.psum(loss(options, *args), ("expert", "pipeline"))

        sharded = jax.shard_map(per_device, mesh=mesh, in_specs=(rows, P(), P()), out_specs=P())
        args = x_TD, w_DE, jnp.asarray(rng.standard_normal(8), jnp.float32)
        got = jax.jit(jax.value_and_grad(sharded, argnums=(0, 1)))(*args)

        def one_device(x_TD, w_DE, bias_E):  # positions start anew on each
            parts = [loss({"implementation": "reference"}, x_TD, w_DE, bias_E) for x_TD in jnp.split(x_TD, 4)]
            return sum(parts)

        assert_close(got, jax.jit(jax.value_and_grad(one_device, argnums=(0, 1)))(*args), 2e-5)

    def test_the_backward_pass_keeps_logits_experts_and_gates_and_scatters_nothing(self, options):
        T, E, K = 64, 8, 2
        route = functools.partial(top_k_routing, experts_per_token=K, **options)
        _, pull_back = jax.vjp(lambda logits_TE: route(logits_TE)[0].gate_TK, jnp.ones((T, E)))
        assert sorted(x.shape for x in jax.tree.leaves(pull_back)) == [(T, K), (T, K), (T, E)]
        assert "scatter" not in jax.jit(pull_back).lower(jnp.ones((T, K))).as_text()


KERNELS = {"cpu": set(), "cuda": {"__gpu$xla.gpu.triton"}, "tpu": {"tpu_custom_call"}}
DEVICE_KINDS = {"cpu": "cpu", "cuda": "NVIDIA H100 80GB HBM3", "tpu": "TPU v5p"}


@pytest.mark.parametrize("platform", KERNELS)
@pytest.mark.parametrize("entry", [top_k_routing, route_tokens])
@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "groups_per_token": 2}], ids=["free", "limited"])
def test_the_mesh_picks_the_implementation_which_the_lowered_program_then_holds(entry, platform, groups):
    device = AbstractDevice(DEVICE_KINDS[platform], None, platform)
    mesh = AbstractMesh((2, 2), ("expert", "tensor"), axis_types=(AxisType.Auto,) * 2, abstract_device=device)
    shapes = [(2048, 16)] if entry is top_k_routing else [(2048, 128), (128, 16)]
    specs = (P("expert"), P())[: len(shapes)]
    args = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    picked = []

    def per_device(*args):
        picked.append(routing_implementation())
        routing, sums = entry(*args, bias_E=jnp.ones(16), experts_per_token=2, **groups)
        return jax.lax.psum(jnp.sin(routing.gate_TK).sum() + sums.z, ("expert",))

    sharded = jax.shard_map(per_device, mesh=mesh, in_specs=specs, out_specs=P())
    traced = jax.jit(jax.value_and_grad(sharded)).trace(*args)
    lowered = traced.lower(lowering_platforms=(platform,)).as_text()
    assert set(picked) == {routing_implementation(platform)}
    assert set(re.findall(r"custom_call @(__gpu[$.\w]+|tpu_custom_call)", lowered)) == KERNELS[platform]


def test_outside_a_mesh_the_default_backend_picks():
    assert jax.default_backend() == "cpu"
    assert routing_implementation() == "reference"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits_TE": jnp.ones(8)}, r"logits_TE is float32\(8,\); must be floating point \[tokens, experts\]"),
        ({"logits_TE": jnp.ones((4, 8), int)}, r"logits_TE is int32\(4, 8\); must be floating point"),
        ({"bias_E": jnp.ones(7)}, r"bias_E is float32\(7,\); must be float32\(8,\)"),
        ({"bias_E": jnp.ones(8, jnp.bfloat16)}, r"bias_E is bfloat16\(8,\); must be float32\(8,\)"),
        ({"experts_per_token": 9}, "experts_per_token=9 must be from 1 to the number of experts, 8"),
        ({"score": "relu"}, "score='relu' must be one of 'softmax', 'sigmoid'"),
        ({"groups_per_token": 2}, "groups_per_token=2 must be from 1 to num_groups=1"),
        ({"num_groups": 3}, "num_groups=3 must be 1, or divide the number of experts, 8, into groups of 2 or more"),
        ({"num_groups": 8}, "num_groups=8 must be 1, or divide the number of experts, 8, into groups of 2 or more"),
        (
            {"num_groups": 4, "experts_per_token": 3},
            "experts_per_token=3 must be at most 2, the experts of 1 of 4 groups",
        ),
        ({"num_sequences": 3}, "num_sequences=3 must divide the number of tokens, 4"),
        ({"implementation": "cub"}, "implementation='cub' must be one of 'reference', 'pallas_gpu', 'pallas_tpu'"),
    ],
)
def test_errors_name_what_would_be_right(change, message):
    with pytest.raises(ValueError, match=message):
        top_k_routing(**{"logits_TE": jnp.ones((4, 8)), "experts_per_token": 2} | change)


@pytest.mark.parametrize(
    ("x_TD", "w_DE", "message"),
    [
        (jnp.ones((4, 3)), jnp.ones((2, 8)), r"w_DE has shape \(2, 8\); must be \(3, experts\) for x's \(4, 3\)"),
        (jnp.ones((1, 4, 3)), jnp.ones((3, 8)), r"x_TD is float32\(1, 4, 3\); must be floating point \[tokens, d_mod"),
    ],
)
def test_errors_of_tokens_and_weights_name_what_would_be_right(x_TD, w_DE, message):
    with pytest.raises(ValueError, match=message):
        route_tokens(x_TD, w_DE, experts_per_token=2)


def test_more_elements_than_a_gpu_kernel_can_index_are_refused():
    logits_TE = jax.ShapeDtypeStruct((2**27, 16), jnp.float32)
    route = functools.partial(top_k_routing, experts_per_token=2, implementation="pallas_gpu")
    with pytest.raises(
        ValueError, match=r"an array \(134217728, 16\) has 2147483648 elements; must be fewer than 2\*\*31"
    ):
        jax.eval_shape(route, logits_TE)


def test_an_unknown_platform_is_refused():
    with pytest.raises(ValueError, match="platform='rocm' has no routing; use 'cpu', 'cuda', 'gpu', 'tpu'"):
        routing_implementation("rocm")


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cuda", "v5p", "v5e"])
@pytest.mark.parametrize(
    "case",
    [
        "65536:16:2:softmax:none:1:1",
        "65536:64:8:softmax:none:1:1",
        "65536:256:8:sigmoid:bias:1:1",
        "65536:256:8:sigmoid:bias:8:4",
        "1000:60:3:softmax:bias:6:2",
    ],
)
def test_compiles_ahead_of_time_for_devices_that_are_not_there(target, case):
    here = Path(__file__).parent
    script = [sys.executable, here / "routing_ahead_of_time.py", target, case]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    platform = "cuda" if target == "cuda" else "tpu"
    assert len(report) == 4  # both entries, forward and gradient
    for program in report:
        assert program["implementation"] == routing_implementation(platform)
        assert set(program["kernels"]) >= KERNELS[platform]
        assert program["peak_bytes"] < 0.5e9
