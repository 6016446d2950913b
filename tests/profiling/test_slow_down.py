"""A phase that is made slower on purpose shows in a trace as that phase, and in no other.

Nothing here compares the times of two runs, which a busy machine changes: the plant's operations are told from all
others of the same trace, by a shape that the model has nowhere. On one device: among several, the others wait in the
collectives of other phases, which is true as well.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from cases import MODEL, Case
from jax import lax

import moejax.train.step
from moejax import hlo
from moejax.profiling import capture, report
from moejax.profiling.trace import Trace, read_trace
from moejax.train.step import make_train_step

CASE = Case(1, 1, 1, model=dataclasses.replace(MODEL, num_layers=2))
STEPS = 2
SQUARE = (512, 512)
PRODUCTS = 8


@jax.custom_jvp
def waste(x_N):
    """Zero, after products that take far longer than a step of the model."""
    square = jnp.tile(x_N[:1], SQUARE)
    return 0.0 * lax.fori_loop(0, PRODUCTS, lambda _, s: jnp.tanh(s @ s), square)[0, 0]


@waste.defjvp
def _(primals, tangents):  # nothing of it is kept for the backward pass, nor done there
    return waste(*primals), 0.0 * tangents[0][0]


def slowed(function):
    """`function`, which then wastes time and changes nothing."""

    def slow(*args, **kwargs):
        (first, *others), structure = jax.tree.flatten(function(*args, **kwargs))
        return jax.tree.unflatten(structure, [first + waste(first.ravel()), *others])

    return slow


def traced(directory) -> tuple[Trace, set[str]]:
    """The trace of `STEPS` steps, and the names of the instructions that are the plant's."""
    step = make_train_step(CASE.program)
    compiled = step.lower().compile()
    state, batch = step.init(jax.random.key(0)), step.put_batch(CASE.batch)
    with capture(directory) as recording:
        for number in range(STEPS):
            with recording.step(number, compiled):
                state, _ = jax.block_until_ready(compiled(state, batch))
    computations = hlo.parse(compiled.as_text()).computations.values()
    planted = {x.name for c in computations for x in c.values() if x.arrays == [SQUARE]}
    return read_trace(directory), planted


@pytest.mark.slow
@pytest.mark.parametrize(
    ("phase", "module", "name"),
    [("expert", jax.nn, "silu"), ("optimizer", moejax.train.step, "clip_by_global_norm")],
)
def test_a_planted_slow_down_shows_in_its_phase_alone(tmp_path, monkeypatch, phase, module, name):
    monkeypatch.setattr(module, name, slowed(getattr(module, name)))
    trace, planted = traced(tmp_path)
    plant = [event for event in trace.events if event.name in planted]
    without = dataclasses.replace(trace, events=[event for event in trace.events if event.name not in planted])
    slow, quick = (report.make_report(each).mean for each in (trace, without))
    assert len(plant) >= PRODUCTS * STEPS
    assert slow.phases[phase] > quick.phases[phase]
    assert slow.op_ms[phase] - quick.op_ms[phase] == pytest.approx(sum(e.duration_ns for e in plant) / 1e6)
    for row in report.ROWS:
        if row != phase:
            assert slow.op_ms[row] == quick.op_ms[row], row
            assert slow.phases[row] <= quick.phases[row] + 1e-6, row
