"""One train step is what optax does to the whole model with the oracle's gradient, on every layout."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from cases import BALANCE, CI_CASES, MODEL, SMALL, UNEVEN, Case, make_batch, per_device_values, relative_error, variant
from reference import oracle
from tiers import full_unless

from moejax.config import OptimizerConfig, RouterConfig
from moejax.train.step import TrainState, make_train_step

STEPS = 20
# An epsilon that a gradient's rounding does not reach: Adam's first step is otherwise the sign of it.
OPTIMIZER = OptimizerConfig(learning_rate=0.1, warmup_steps=3, eps=1e-3, weight_decay=0.2, clip_norm=0.5)


def first_state(case, step):
    params = case.place(case.logical_params)
    moments = jax.jit(step.optimizer.init, out_shardings=step.state_shardings.opt_state)(params)
    number, balance = np.int32(0), case.program.balancer.init()
    number, balance = jax.device_put((number, balance), (step.state_shardings.step, step.state_shardings.balance))
    return TrainState(number, params, moments, balance)


def run_step(case, batch=None, **fields):
    """The state and the metrics after one step, with other fields of the case's layout."""
    step = make_train_step(case.program.with_layout(**fields), OPTIMIZER, steps=STEPS)
    return step.lower().compile()(first_state(case, step), step.put_batch(batch or case.batch))


@functools.cache
def stepped(case):
    return run_step(case)


def by_hand(params, grads):
    """Clipping and AdamW by optax, on one device in float64."""
    schedule = optax.warmup_cosine_decay_schedule(
        OPTIMIZER.learning_rate / 4, OPTIMIZER.learning_rate, 3, STEPS, OPTIMIZER.learning_rate * 0.1
    )
    no_norms = functools.partial(
        jax.tree.map_with_path, lambda path, _: not any(name in path[-1].key for name in ("norm", "bias"))
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(OPTIMIZER.clip_norm),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-3, weight_decay=0.2, mask=no_norms),
    )
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, grads = jax.tree.map(lambda x: jax.numpy.asarray(x, jax.numpy.float64), (params, grads))
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        return jax.tree.map(np.asarray, optax.apply_updates(params, updates)), float(optax.tree.norm(grads))


# test_equivalence.py has the gradients of more cases in the full tier.
TIERED = full_unless(SMALL.__eq__, (SMALL, *CI_CASES, UNEVEN), slow=lambda case: True)


def assert_close(actual, expected):
    errors = jax.tree.map(relative_error, actual, expected)
    worst = max(jax.tree.leaves_with_path(errors), key=lambda path_and_error: path_and_error[1])
    assert worst[1] < 1e-5, worst


@pytest.mark.parametrize("case", TIERED, ids=str)
def test_one_step_is_optax_on_the_whole_model(case):
    state, metrics = stepped(case)
    result, grads = case.oracle()
    params, norm = by_hand(case.logical_params, grads)
    assert norm > 2 * OPTIMIZER.clip_norm  # so that a wrong norm is a wrong step
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert float(metrics["loss"]) == pytest.approx(float(result.loss), rel=1e-5)
    assert float(metrics["learning_rate"]) == pytest.approx(0.1 / 4)
    np.testing.assert_array_equal(metrics["load_LE"], result.load_LE)
    assert float(metrics["dropped_fraction"]) == pytest.approx(result.dropped_L.sum() / result.load_LE.sum())
    if case.model.router.bias:
        moe = params["layers"]["moe"]
        load_LE = np.asarray(result.load_LE, np.float64)
        bias_LE = moe["router_bias_E"] + BALANCE.bias_update_rate * np.sign(load_LE.mean(1, keepdims=True) - load_LE)
        moe["router_bias_E"] = bias_LE - bias_LE.mean(1, keepdims=True)
    assert_close(case.unplace(state.params), params)
    np.testing.assert_array_equal(state.balance.load_WLE[0], result.load_LE)
    np.testing.assert_array_equal(state.balance.dropped_WL[0], result.dropped_L)
    assert int(state.step) == int(state.balance.num_steps) == 1


@pytest.mark.parametrize("case", TIERED, ids=str)
def test_no_device_disagrees_after_a_step(case):
    for path, x in jax.tree.leaves_with_path(stepped(case)):
        for values in per_device_values(x):
            assert all(value.tobytes() == values[0].tobytes() for value in values), jax.tree_util.keystr(path)


@pytest.mark.full
def test_a_bias_without_a_rate_stays_as_it_is():
    case = Case(1, 1, 1, model=variant(num_layers=1, router=RouterConfig(bias=True)))
    balance = dataclasses.replace(BALANCE, bias_update_rate=0.0)
    step = make_train_step(dataclasses.replace(case.program, balance=balance), OPTIMIZER, steps=STEPS)
    state, _ = step(first_state(case, step), step.put_batch(case.batch))
    before, after = case.logical_params["layers"]["moe"], case.unplace(state.params)["layers"]["moe"]
    np.testing.assert_array_equal(after["router_bias_E"], before["router_bias_E"])
    assert (after["w_router_DE"] != before["w_router_DE"]).any()


@pytest.mark.slow
def test_accumulated_slices_are_the_step_of_the_whole_batch():
    """Though no two have as many targets, or the same load of the experts."""
    case = Case(4, 2, 2, gather="layer", remat="full")
    batch = make_batch(MODEL.vocab_size, 32, case.seq_len, seed=1)
    for i, targets_S in enumerate(batch["targets"]):
        targets_S[(i * 5) % 17 :] = -100
    result, grads = oracle.loss_and_grads(case.logical_params, batch, MODEL, BALANCE)
    expected, norm = by_hand(case.logical_params, grads)

    state, figures = run_step(case, batch, batch_size=32, grad_accumulation_steps=2)
    assert_close(case.unplace(state.params), expected)
    assert float(figures["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    for name in ("loss", "cross_entropy", "aux_loss", "sequence_loss", "z_loss"):
        assert float(figures[name]) == pytest.approx(float(getattr(result, name)), rel=1e-5), name
    assert int(figures["num_targets"]) == (batch["targets"] != -100).sum()
    np.testing.assert_array_equal(figures["load_LE"], result.load_LE)
    np.testing.assert_array_equal(state.balance.load_WLE[0], result.load_LE)

    # Each device cuts its own part of the batch, so a half has the front or the rear of every part.
    parts = {name: x.reshape(4, 2, -1, case.seq_len) for name, x in batch.items()}
    halves = [{name: x[:, i].reshape(16, -1) for name, x in parts.items()} for i in range(2)]
    params = case.place(case.logical_params)
    metrics = [case.value_and_grad(params, case.place_batch(half))[0][1] for half in halves]
    rounds_L, dispatches_L = (
        sum(np.asarray(getattr(m["router"], name)).reshape(-1) for m in metrics) for name in ("rounds", "dispatches")
    )
    np.testing.assert_array_equal(dispatches_L, 2 * case.num_microbatches * 4 * 2)  # halves, microbatches, senders
    np.testing.assert_allclose(state.balance.rounds_WL[0], rounds_L / dispatches_L, rtol=1e-6)


@pytest.mark.full
def test_evaluation_is_the_loss_of_the_oracle_without_drops():
    case = CI_CASES[1]
    assert case.strategy == "capacity"
    step = make_train_step(case.program, OPTIMIZER, steps=STEPS)
    metrics = step.evaluate(case.place(case.logical_params), step.put_batch(case.batch))
    assert float(metrics["loss"]) == pytest.approx(
        float(dataclasses.replace(case, strategy="dropless").oracle()[0].loss), rel=1e-6
    )


def test_a_state_can_be_described_without_making_it():
    case = CI_CASES[2]
    step = make_train_step(case.program, OPTIMIZER, steps=STEPS)
    described, made = step.state_shapes, first_state(case, step)
    same = jax.tree.map(lambda d, m: (d.shape, d.dtype, d.sharding) == (m.shape, m.dtype, m.sharding), described, made)
    assert all(jax.tree.leaves(same))
