"""A phase that is made slower on purpose shows in a trace as that phase, and in no other.

On one device: among several, the others wait in the collectives of other phases, which is true as well.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from layouts import MODEL, Layout

import moejax.train.step
from moejax.profiling import capture, report
from moejax.profiling.trace import read_trace
from moejax.train.step import make_train_step

LAYOUT = Layout(1, 1, 1, model=dataclasses.replace(MODEL, num_layers=2))
STEPS = 3


@jax.custom_jvp
def waste(x_N):
    """Zero, after products that take far longer than a step of the model."""
    square = jnp.tile(x_N[:1], (512, 512))
    return 0.0 * lax.fori_loop(0, 8, lambda _, s: jnp.tanh(s @ s), square)[0, 0]


@waste.defjvp
def _(primals, tangents):  # nothing of it is kept for the backward pass, nor done there
    return waste(*primals), 0.0 * tangents[0][0]


def slowed(function):
    """`function`, which then wastes time and changes nothing."""

    def slow(*args, **kwargs):
        (first, *others), structure = jax.tree.flatten(function(*args, **kwargs))
        return jax.tree.unflatten(structure, [first + waste(first.ravel()), *others])

    return slow


def phases_of(directory):
    """ms of each phase in `STEPS` traced steps."""
    step = make_train_step(LAYOUT.program)
    compiled = step.lower(LAYOUT.batch_size, LAYOUT.seq_len).compile()
    state, batch = step.init(jax.random.key(0)), step.put_batch(LAYOUT.batch)
    state, _ = jax.block_until_ready(compiled(state, batch))
    with capture(directory) as recording:
        for number in range(STEPS):
            with recording.step(number, compiled):
                state, _ = jax.block_until_ready(compiled(state, batch))
    return report.make_report(read_trace(directory)).mean.phases


@pytest.fixture(scope="module")
def as_it_is(tmp_path_factory):
    return phases_of(tmp_path_factory.mktemp("as_it_is"))


@pytest.mark.parametrize(
    ("phase", "module", "name"),
    [
        ("expert", jax.nn, "silu"),
        ("optimizer", moejax.train.step, "clip_by_global_norm"),
    ],
)
def test_a_planted_slow_down_shows_in_its_phase_alone(tmp_path, monkeypatch, as_it_is, phase, module, name):
    monkeypatch.setattr(module, name, slowed(getattr(module, name)))
    planted = phases_of(tmp_path)
    more = {row: planted[row] - as_it_is[row] for row in report.ROWS}
    assert more[phase] > as_it_is[phase]
    for row in report.ROWS:
        if row != phase:
            assert more[row] < 0.1 * more[phase], row
