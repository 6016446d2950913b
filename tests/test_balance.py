"""The balancer: biases, the window and what is decided from it, against the same by hand."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from moejax.balance import BoundWatch, ExpertLoadBalancer, Figure, LayerStats, load_cv_floor
from moejax.balance.balancer import every_layer
from moejax.balance.bounds import FRESH_WINDOWS
from moejax.config import BalanceConfig, DispatchConfig, ModelConfig, OptimizerConfig, RouterConfig
from moejax.mesh import MeshConfig, build_mesh

MODEL = ModelConfig(num_layers=3, num_experts=8, experts_per_token=2, dtype="float32")
LAYERS, EXPERTS, TOKENS = MODEL.num_moe_layers, MODEL.num_experts, 1024
SIZES = (1.25, 1.5, 2.0, 3.0)


def make_balancer(dispatch=None, **fields):
    return ExpertLoadBalancer(MODEL, BalanceConfig(**({"window": 4, "capacity_factors": SIZES} | fields)), dispatch)


def stats(load_LE, rounds=1.0, dropped=0.0, entropy=1.0):
    """The global sums of a step with these loads, in which each layer dispatched twice."""
    load_LE = np.asarray(load_LE, np.float32)
    L = np.ones(len(load_LE), np.float32)
    figures = dict.fromkeys(LayerStats._fields, 0 * L)
    figures |= {"count_E": load_LE, "dropped": dropped * L, "rounds": 2 * rounds * L, "dispatches": 2 * L}
    return LayerStats(**figures | {"entropy": entropy * load_LE.sum(-1) / 2})._replace(prob_E=load_LE)


def loads(busiest, layer=0):
    """Loads of TOKENS tokens, even but for one layer, whose first expert has `busiest` times the mean."""
    load_LE = np.full((LAYERS, EXPERTS), TOKENS * 2 / EXPERTS)
    load_LE[layer, 0] *= busiest
    load_LE[layer, 1:] -= load_LE[layer, 1] * (busiest - 1) / (EXPERTS - 1)
    return load_LE


def run(balancer, steps, state=None):
    """The state after each of these steps' global sums, and the first."""
    states, update = [state or balancer.init()], jax.jit(balancer.update)
    for step in steps:
        states.append(update(states[-1], step))
    return states


def sizes(balancer, states):
    return [balancer.capacity_factors[int(balancer.capacity_index(state))] for state in states]


def test_the_window_is_the_last_steps_by_hand():
    balancer = make_balancer(window=3)
    rng = np.random.default_rng(0)
    steps = [stats(rng.integers(1, 100, (LAYERS, EXPERTS)), rounds=1 + i, dropped=i, entropy=i / 10) for i in range(5)]
    for n, state in enumerate(run(balancer, steps)[1:], start=1):
        kept = steps[max(0, n - 3) : n]
        load_LE = sum(step.count_E.astype(np.float64) for step in kept)
        np.testing.assert_array_equal(balancer.last_load(state), steps[n - 1].count_E)
        report = jax.device_get(balancer.report(state))
        assert report.num_steps == len(kept)
        assert report.num_tokens == pytest.approx(load_LE.sum() / LAYERS / 2)
        floor = load_cv_floor(float(report.num_tokens), 2, EXPERTS)
        assert report.load_cv_floor == pytest.approx(floor, rel=1e-5)
        np.testing.assert_allclose(report.load_LE, load_LE)
        np.testing.assert_allclose(report.cv_L, load_LE.std(1) / load_LE.mean(1), rtol=1e-5)
        np.testing.assert_allclose(report.max_over_mean_L, load_LE.max(1) / load_LE.mean(1), rtol=1e-6)
        np.testing.assert_allclose(report.rounds_L, np.mean([step.rounds / 2 for step in kept], axis=0))
        dropped_L = sum(step.dropped for step in kept)
        np.testing.assert_allclose(report.dropped_fraction_L, dropped_L / load_LE.sum(1), rtol=1e-6)
        np.testing.assert_allclose(report.entropy_L, np.mean([i / 10 for i in range(5)][max(0, n - 3) : n]), rtol=1e-5)
        scalars = report.scalars()
        assert scalars["window_load_cv_worst"] == report.cv_L.max()
        assert scalars["window_rounds"] == pytest.approx(report.rounds_L.mean())


def test_a_bias_moves_towards_the_mean_load_and_does_not_drift():
    balancer = make_balancer(bias_update_rate=0.1)
    bias_LE = np.asarray([[0.0, 0.0, 0.0, 0.0], [0.3, -0.1, -0.1, -0.1]], np.float32)
    count_LE = np.asarray([[10.0, 4.0, 4.0, 2.0], [5.0, 5.0, 5.0, 5.0]], np.float32)  # means 5 and 5
    moved_LE = bias_LE + 0.1 * np.asarray([[-1, 1, 1, 1], [0, 0, 0, 0]])
    expected_LE = moved_LE - moved_LE.mean(1, keepdims=True)
    np.testing.assert_allclose(balancer.move_bias(jnp.asarray(bias_LE), jnp.asarray(count_LE)), expected_LE, atol=1e-7)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_a_skewed_router_becomes_balanced_by_its_biases_alone(score):
    """The router and its tokens stay what they are; two experts are far ahead of the others."""
    rng = np.random.default_rng(0)
    logits_TE = rng.normal(size=(4096, EXPERTS)).astype(np.float32) + np.asarray([3, 2] + [0] * 6, np.float32)
    score_TE = jax.nn.softmax(logits_TE) if score == "softmax" else jax.nn.sigmoid(logits_TE)
    balancer = make_balancer(bias_update_rate=0.003)

    def step(bias_E, _):
        _, expert_TK = jax.lax.top_k(score_TE + bias_E[None], 2)
        count_E = (expert_TK[..., None] == jnp.arange(EXPERTS)[None, None]).sum((0, 1), dtype=jnp.float32)
        return balancer.move_bias(bias_E, count_E), count_E

    _, count_SE = jax.lax.scan(step, jnp.zeros(EXPERTS), length=400)
    cv = lambda count_E: count_E.std() / count_E.mean()  # noqa: E731
    assert cv(count_SE[0]) > 0.8
    assert cv(count_SE[-32:].sum(0)) < 0.05  # over a window; step by step a rate leaves a ripple
    assert max(map(cv, count_SE[-32:])) < 0.1


def test_the_size_follows_the_busiest_expert_and_returns():
    balancer = make_balancer()
    even, skewed, hopeless = (stats(loads(busiest)) for busiest in (1.04, 1.3, 5.0))
    states = run(balancer, [even] * 4 + [skewed] * 4 + [hopeless] * 4 + [even] * 4)
    chosen = sizes(balancer, states)
    assert chosen[:8] == [1.5] * 8  # nothing changes inside a window
    assert chosen[8:12] == [2.0] * 4  # 1.5 * 1.3 = 1.95
    assert chosen[12:16] == [3.0] * 4  # the largest, though 7.5 is wanted: memory is bounded
    assert chosen[16] == 1.5


def test_any_layer_can_ask_for_more():
    for layer in range(LAYERS):
        balancer = make_balancer()
        assert sizes(balancer, run(balancer, [stats(loads(1.9, layer))] * 4))[-1] == 3.0


def test_a_load_at_a_boundary_does_not_switch_to_and_fro():
    balancer = make_balancer()
    noisy = [stats(loads(1.42 - 0.03 * (-1) ** window)) for window in range(12) for _ in range(4)]  # 2.09, 2.18, …
    chosen = sizes(balancer, run(balancer, noisy))[4:]
    assert chosen == [2.0] * len(chosen)
    [*_, large] = run(balancer, [stats(loads(3.0))] * 4)
    back = sizes(balancer, run(balancer, noisy[4:], large))
    assert back[:8] == [3.0] * 8, "2.18 is 9% more than 2.0: not taken, though it was kept above"
    assert back[8:] == [2.0] * len(back[8:])


def test_rounds_that_cost_more_than_the_next_size_ask_for_it_until_the_loads_change():
    balancer = make_balancer()
    cheap, dear = stats(loads(1.0), rounds=1.3), stats(loads(1.0), rounds=1.4)  # 1.5 -> 2.0 pays from 4 / 3 on
    assert sizes(balancer, run(balancer, [cheap] * 4))[-1] == 1.5
    states = run(balancer, [dear] * 4 + [stats(loads(1.0))] * 8)
    assert sizes(balancer, states)[4:] == [2.0] * 9
    more = run(balancer, [stats(loads(1.0), rounds=9.0)] * 12, states[-1])
    assert sizes(balancer, more)[-1] == 3.0  # never beyond the largest
    calmer = run(balancer, [stats(loads(1.3))] * 4 + [stats(loads(1.0))] * 4, states[-1])
    assert sizes(balancer, calmer)[-1] == 1.5


def test_the_size_starts_nearest_to_the_dispatchs_and_stays_where_there_is_no_choice():
    balancer = make_balancer(DispatchConfig(capacity_factor=2.6))
    assert sizes(balancer, [balancer.init()]) == [3.0]
    for fixed in (
        make_balancer(DispatchConfig(strategy="capacity", capacity_factor=1.1)),
        make_balancer(DispatchConfig(capacity_factor=1.1), capacity_factors=()),
    ):
        assert fixed.capacity_factors == (1.1,)
        assert sizes(fixed, run(fixed, [stats(loads(4.0), rounds=3.0)] * 4)) == [1.1] * 5


def test_figures_are_of_the_worst_layer_beside_their_bound():
    balancer = make_balancer(max_load_cv=0.2, max_rounds=2.0, max_dropped_fraction=0.1, max_idle_experts=0)
    idle = loads(1.0)
    idle[1, 0] = 0
    for step, out in (
        (stats(loads(1.1)), {}),
        (stats(loads(2.0, layer=2)), {"max_load_cv": (2, 0.378, 0.2)}),
        (stats(loads(1.0), rounds=2.5), {"max_rounds": (0, 2.5, 2.0)}),
        (stats(loads(1.0), dropped=400.0), {"max_dropped_fraction": (0, 0.195, 0.1)}),
        (stats(idle), {"max_idle_experts": (1, 1, 0), "max_load_cv": (1, 0.378, 0.2)}),
    ):
        states = run(balancer, [step] * 4)
        figures = balancer.figures(jax.device_get(balancer.report(states[-1])))
        assert figures.keys() == {"max_load_cv", "max_dropped_fraction", "max_rounds", "max_idle_experts"}
        assert {name for name, figure in figures.items() if figure.value > figure.bound} == out.keys()
        for name, (layer, value, bound) in out.items():
            assert (figures[name].layer, figures[name].bound) == (layer, bound)
            assert figures[name].value == pytest.approx(value, abs=1e-3)
        assert balancer.figures(jax.device_get(balancer.report(states[-2]))) == {}, "the window is not full yet"


WINDOW, BOUND = 4, 2.0
FRESH = FRESH_WINDOWS * WINDOW


def said(values, *, first=FRESH + 1):
    """The steps of `values` at which a line is printed, and whether it is a warning, for one figure from `first` on."""
    watch, found = BoundWatch(WINDOW), []
    for step, value in enumerate(values, start=first):
        for line in watch.update(step, {"max_rounds": Figure("rounds", 3, value, BOUND, "more room")}):
            found.append((step - first + 1, "again" not in line))
    return found


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.5] * 3 + [1.5] + [2.5] * 3, []),  # never for a whole window on end
        ([2.5] * 4, [(4, True)]),
        ([2.5] * 100, [(4, True)]),
        ([2.02, 1.98] * 50, []),  # at its bound
        ([2.5] * 4 + [1.9, 2.1] * 20, [(4, True)]),  # neither clearly inside nor said again
        ([2.5] * 6 + [1.9, 1.7, 1.0], [(4, True), (8, False)]),
        ([2.5] * 4 + [1.0] + [2.5] * 15, [(4, True), (5, False)]),  # too soon after the last warning
        ([2.5] * 4 + [1.0] + [2.5] * 16, [(4, True), (5, False), (21, True)]),
        ([math.nan] * 20, []),
    ],
)
def test_a_warning_is_for_a_figure_that_stays_out_and_a_return_for_one_that_is_clearly_back(values, expected):
    assert said(values) == expected


def test_nothing_is_said_while_the_router_is_fresh():
    assert said([9.0] * FRESH, first=1) == []
    assert said([9.0] * (FRESH + WINDOW), first=1) == [(FRESH + WINDOW, True)]
    assert said([9.0] * WINDOW, first=1000) == [(WINDOW, True)], "a run that goes on has no fresh router"


def test_bounds_are_watched_apart_and_lines_say_all_that_is_needed():
    watch, lines = BoundWatch(WINDOW), []
    idle = Figure("the number of experts without a token", 1, 2, 0, "more warm-up")
    fine = Figure("load CV", 0, 0.1, 0.5, "nothing")
    for step in range(FRESH + 1, FRESH + 10):
        now = idle if step < FRESH + 6 else idle._replace(value=0)
        lines += watch.update(step, {"max_idle_experts": now, "max_load_cv": fine})
    assert lines == [
        "step 16, layer 1: the number of experts without a token is 2, more than balance.max_idle_experts=0, "
        "and has been for 4 steps; try more warm-up",
        "step 18: every layer is within balance.max_idle_experts=0 again",
    ]


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.01])
@pytest.mark.parametrize("weight", [0.0, 0.01])
@pytest.mark.parametrize("strategy", ["dropless", "capacity"])
@pytest.mark.parametrize("sizes", [(), SIZES])
def test_what_is_recommended_is_not_in_force_already(biased, rate, weight, strategy, sizes):
    balance = BalanceConfig(aux_loss_weight=weight, bias_update_rate=rate, capacity_factors=sizes, window=1)
    model = dataclasses.replace(MODEL, router=RouterConfig(bias=biased))
    configs = {"model": model, "balance": balance, "dispatch": DispatchConfig(strategy=strategy)}
    configs["optimizer"] = OptimizerConfig()
    balancer = ExpertLoadBalancer(model, balance, configs["dispatch"])
    [_, state] = run(balancer, [stats(loads(2.0))])
    for figure in balancer.figures(jax.device_get(balancer.report(state))).values():
        remedy = figure.remedy.replace(",", "").replace("layout.dispatch.", "dispatch.")
        recommended = re.findall(r"([a-z]+)\.([a-z_]+)(=\S+)?( than [\d.]+)?", remedy)
        assert recommended
        for part, field, value, now in recommended:
            current = getattr(configs[part], field)
            assert not value or value[1:].lower() != str(current).lower()
            largest = current[-1] if isinstance(current, tuple) else current
            assert not now or float(now.split()[1]) == largest > 0


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 4, 2)])
def test_every_device_has_the_sums_of_every_layer_in_logical_order(shape):
    mesh = build_mesh(MeshConfig(*shape), jax.devices()[: np.prod(shape)])
    repeats, stages, chunk = 2, shape[1], 3
    load_RPlE = np.arange(repeats * stages * chunk * 4, dtype=np.float32).reshape(repeats, stages, chunk, 4)
    per_layer = dict.fromkeys(LayerStats._fields, load_RPlE[..., 0]) | {"count_E": load_RPlE, "prob_E": load_RPlE}
    num_layers = repeats * stages * chunk - 1  # so that the last place is empty
    gather = jax.shard_map(
        functools.partial(every_layer, num_layers=num_layers), mesh=mesh, in_specs=P(None, "pipeline"), out_specs=P()
    )
    gathered = jax.jit(gather)(LayerStats(**per_layer))
    np.testing.assert_array_equal(gathered.count_E, load_RPlE.reshape(-1, 4)[:num_layers])
    np.testing.assert_array_equal(gathered.rounds, load_RPlE[..., 0].reshape(-1)[:num_layers])
