"""The learning rate over a run of any length."""

import jax
import numpy as np
import pytest

from moejax.checks import ConfigError
from moejax.config import OptimizerConfig
from moejax.layout import Layout
from moejax.mesh import MeshConfig, build_mesh
from moejax.presets import tiny
from moejax.program import Program
from moejax.train.optimizer import learning_rate_schedule
from moejax.train.step import make_train_step


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 20, 999, 20_000])
@pytest.mark.parametrize("warmup_steps", [None, 0])
def test_every_run_reaches_the_peak_and_ends_at_the_final_fraction(steps, warmup_steps):
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=warmup_steps, final_learning_rate_fraction=0.1)
    rates = jax.vmap(learning_rate_schedule(config, steps))(np.arange(steps + 1, dtype=np.float32))
    top = int(np.argmax(rates))
    assert top == config.warmup(steps) == (0 if warmup_steps == 0 else min(steps // 10, 500))
    np.testing.assert_allclose([rates[top], rates[-1]], [0.5, 0.05], rtol=1e-5)
    assert (np.diff(rates[: top + 1]) > 0).all()
    assert rates[0] > 0  # the first step moves already
    assert (np.diff(rates[top:]) <= 0).all()


@pytest.mark.parametrize(
    ("warmup_steps", "steps", "message"),
    [
        (50, 20, "optimizer.warmup_steps=50 must be less than steps=20; None is a tenth of the steps"),
        (20, 20, "optimizer.warmup_steps=20 must be less than steps=20; None is a tenth of the steps"),
        (None, 0, "steps=0 must be positive"),
        (None, -3, "steps=-3 must be positive"),
    ],
)
def test_a_train_step_refuses_a_run_that_only_warms_up(warmup_steps, steps, message):
    program = Program(tiny(), Layout(), build_mesh(MeshConfig(), jax.devices()[:1]))
    with pytest.raises(ConfigError) as error:
        make_train_step(program, OptimizerConfig(warmup_steps=warmup_steps), steps=steps)
    assert str(error.value) == message


def test_the_default_optimizer_suits_a_short_run():
    program = Program(tiny(), Layout(), build_mesh(MeshConfig(), jax.devices()[:1]))
    assert float(make_train_step(program, steps=20).schedule(2.0)) == pytest.approx(OptimizerConfig().learning_rate)
