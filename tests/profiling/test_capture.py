"""Traces of a real train step on the 16 virtual devices: taken when asked for, and nearly all of it has a phase."""

import dataclasses
import json
import types

import jax
import pytest
from cases import MODEL, Case

from moejax.checks import ConfigError
from moejax.config import ModelConfig
from moejax.layout import Layout
from moejax.overrides import from_record
from moejax.profiling import capture, report, tables, timeline
from moejax.profiling.capture import StepCapture, parse_steps
from moejax.profiling.intervals import intersection, union
from moejax.profiling.trace import FACTS, Event, Marker, Trace, read_trace
from moejax.train.step import make_train_step

CASE = Case(4, 2, 2, model=dataclasses.replace(MODEL, num_layers=2))


@pytest.fixture(scope="module", params=[pytest.param(None, marks=pytest.mark.full)])  # and the tests that use it
def profiles(tmp_path_factory):
    """The traces of a run of 8 steps, of which 2 and 3 are asked for before, 5 while it runs, 7 and 8 by mistake."""
    workdir = tmp_path_factory.mktemp("run")
    step = make_train_step(CASE.program)
    compiled = step.lower().compile()
    fitted = types.SimpleNamespace(compiled=compiled, step=step)
    state, batch = step.init(jax.random.key(0)), step.put_batch(CASE.batch)
    with StepCapture(workdir, range(2, 4)) as profiler:
        for number in range(1, 9):
            if number in (5, 7, 8):
                (workdir / "profile").write_bytes({5: b"1\n", 7: "²".encode(), 8: b"\xff"}[number])
            with profiler.step(number, fitted):
                state, _ = jax.block_until_ready(compiled(state, batch))
            assert not (workdir / "profile").exists()
    return workdir / "profiles"


@pytest.fixture(scope="module")
def trace(profiles):
    return read_trace(profiles / "step_000002")


@pytest.fixture(scope="module")
def found(trace):
    return report.make_report(trace)


def test_the_steps_asked_for_are_traced_and_no_others(profiles):
    steps = {
        folder.name: [step["step"] for step in json.loads((folder / FACTS).read_text())["steps"]]
        for folder in profiles.iterdir()
    }
    assert steps == {"step_000002": [2, 3], "step_000005": [5]}


def test_nearly_all_time_has_a_phase(trace, found):
    assert [marker.step for marker in trace.steps] == [2, 3]
    assert list(found.devices) == [f"CPU {i}" for i in range(16)]
    assert found.mean.attributed > 0.95
    for usage in (found.mean, *found.devices.values()):
        assert sum(usage.phases.values()) + usage.bubble_ms + usage.idle_ms == pytest.approx(usage.window_ms)
    in_steps = sum(sum(usage.op_ms.values()) for usage in found.devices.values())
    assert in_steps == pytest.approx(sum(event.duration_ns for event in trace.events) / 1e6, rel=0.02)
    for phase in report.PHASES:
        assert found.mean.op_ms[phase] > 0, phase
    for phase in ("attention", "expert", "dispatch", "combine", "logits"):
        assert 0 < found.mean.backward_ms[phase] < found.mean.op_ms[phase], phase
    assert found.mean.backward_ms["optimizer"] == 0
    assert {phase for phase, ms in found.mean.exposed.items() if ms} >= {"dispatch", "combine", "pipeline", "gather"}


def test_the_model_and_the_layout_come_along(trace, found):
    assert [step["step"] for step in trace.facts["steps"]] == [2, 3]
    for step in trace.facts["steps"]:
        assert from_record(ModelConfig, step["model"], "model") == (CASE.model, [])
        assert from_record(Layout, step["layout"], "layout") == (CASE.layout, [])
    assert found.tokens == 2 * CASE.batch_size * CASE.seq_len
    assert found.predicted.hardware == "cpu"
    assert found.predicted.phase_ms.keys() == {*report.PHASES, "bubble", "host"}
    peak = found.predicted.step_ms / found.step_ms  # the prediction's utilization, at the measured speed
    assert found.mfu == pytest.approx(found.predicted.model_ms / found.predicted.step_ms * peak)
    assert found.hfu > found.mfu  # buffers are computed whole
    text = tables.as_markdown(found)
    for part in ("| attention |", "| CPU 15 |", "| **mean** |", "| bubble of the pipeline |", "can't tell", "MFU",
                 "one assumed virtual device", "in the ticks of the bubble as well"):  # fmt: skip
        assert part in text
    assert "not told apart" not in text
    assert "in no step" not in text


def test_the_bubble_is_where_a_stage_has_no_microbatch(trace, found):
    """Of two microbatches on two stages it is one tick in three of each pass: in a device's, no layer computes."""
    assert found.bubble.keys() == found.devices.keys()
    for device, ticks in found.bubble.items():
        assert 0 < found.devices[device].bubble_ms < found.devices[device].window_ms
        layers = [(e.start_ns, e.end_ns) for e in trace.events if e.device == device and e.phase == "expert"]
        assert intersection(union(layers), ticks) == []
        assert len(ticks) >= 4  # two passes, two steps


def test_the_picture(trace, found):
    picture = timeline.figure(trace, found)
    devices, bars = picture.axes
    assert [label.get_text() for label in devices.get_yticklabels()] == list(found.devices)
    assert "step 2" in devices.get_title() or "step 3" in devices.get_title()
    assert [label.get_text().split()[0] for label in bars.get_yticklabels()] == ["measured", "predicted"]
    widths = [bar.get_width() for bar in bars.patches if bar.get_y() < 0.5]
    assert sum(widths) == pytest.approx(100)
    shown = {text.get_text() for text in picture.legends[0].get_texts()}
    assert shown == {*report.ROWS, "bubble", "idle"}


def test_a_trace_of_anything(tmp_path):
    compiled = jax.jit(lambda x: jax.numpy.sin(x @ x)).lower(jax.ShapeDtypeStruct((64, 64), "float32")).compile()
    with capture(tmp_path / "a") as recording, recording.step(4, compiled):
        compiled(jax.numpy.ones((64, 64))).block_until_ready()
    trace = read_trace(tmp_path / "a")
    assert trace.platform == "cpu"
    assert [marker.step for marker in trace.steps] == [4]
    assert {event.device for event in trace.events} == {"CPU 0"}
    assert {event.phase for event in trace.events} == {None}
    found = report.make_report(trace)
    assert found.tokens is found.predicted is found.mfu is found.bubble is None
    assert json.loads(json.dumps(tables.as_data(found)))["num_steps"] == 1
    for part in ("No prediction, MFU or HFU", "Nothing says of what phase an operation is"):
        assert part in tables.as_markdown(found)
    assert len(timeline.figure(trace, found).axes[1].get_yticklabels()) == 1  # nothing beside what was measured


def test_what_cannot_be_captured_is_one_line_and_leaves_the_profiler_free(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^directory=.*/file/a cannot be a folder \(.*\); give another$"):
        capture(tmp_path / "file" / "a").__enter__()
    wrong = pytest.raises(ConfigError, match=r"^compiled=<function .* must be a compiled program, as \.lower")
    with capture(tmp_path / "a") as recording, wrong, recording.step(1, test_steps):
        pass
    with capture(tmp_path / "b"):
        pass


@pytest.mark.parametrize("text", ["0:3", "5:5", "7:5", "5:22", "5", "a:b", "-1:3", "1:2:3", "1:" + "9" * 20])
def test_steps_out_of_the_run_are_one_line(text):
    message = f"^--profile_steps={text} must be FIRST:END with 1 <= FIRST < END <= 21; 10:13 is steps 10, 11 and 12$"
    with pytest.raises(ConfigError, match=message):
        parse_steps(text, 20)


def test_steps():
    assert list(parse_steps("10:13", 20)) == [10, 11, 12]
    assert list(parse_steps("1:21", 20)) == list(range(1, 21))


def test_steps_that_were_not_waited_for_are_one_line(trace):
    early = dataclasses.replace(trace, steps=[Marker(1, -20.0, -10.0)])
    with pytest.raises(ConfigError, match="no operation inside its steps; wait"):
        report.make_report(early)


def test_of_the_longest_operations_only_what_is_inside_the_steps_counts():
    events = [Event("CPU 0", "", name, start, end - start, None, False, False) for name, start, end in (
        ("a", -70, 30), ("b", 40, 80), ("b", 90, 200),
    )]  # fmt: skip
    found = report.make_report(Trace("cpu", events, [Marker(1, 0, 50), Marker(2, 60, 100)], {}))
    assert [(op["name"], op["times"], round(1e6 * op["total_ms"])) for op in found.longest] == [
        ("b", 2, 40),
        ("a", 1, 30),
    ]
    assert sum(found.mean.op_ms.values()) == pytest.approx(70e-6)
    assert found.outside == pytest.approx(1 - 70 / 250)
    assert "\n72.0% of the operations' time is in no step, so it is not counted above" in tables.as_markdown(found)


def in_ns(figures_ms):
    return {name: round(1e6 * ms) for name, ms in figures_ms.items() if ms}


def test_a_usage_counts_every_instant_once():
    """Products 0 to 100, an exchange 60 to 150, and another phase's from 140 to 160, in a step from 10 to 200."""
    event = dataclasses.make_dataclass("E", ["phase", "start_ns", "end_ns", "communication", "backward"])
    events = [
        event("expert", 0, 60, False, False),
        event("attention", 50, 100, False, True),
        event("dispatch", 60, 150, True, False),
        event("combine", 140, 160, True, False),
        event(None, 170, 180, False, False),
    ]
    usage = report.measure(events, [(10, 200)])
    times = ("window_ms", "running_ms", "compute_ms", "communication_ms", "exposed_ms", "bubble_ms", "idle_ms")
    assert [round(1e6 * getattr(usage, name)) for name in times] == [190, 160, 100, 100, 60, 0, 30]
    # where two operations of one kind run at once, the phase that is named first has the time
    assert in_ns(usage.phases) == {"attention": 50, "expert": 40, "dispatch": 50, "combine": 10, report.UNNAMED: 10}
    assert in_ns(usage.exposed) == {"dispatch": 50, "combine": 10}
    assert in_ns(usage.op_ms) == {"expert": 50, "attention": 50, "dispatch": 90, "combine": 20, report.UNNAMED: 10}
    assert in_ns(usage.backward_ms) == {"attention": 50}
    assert usage.busy == pytest.approx(160 / 190)
    assert usage.attributed == pytest.approx(210 / 220)


def test_what_runs_in_the_bubble_is_of_no_phase():
    event = dataclasses.make_dataclass("E", ["phase", "start_ns", "end_ns", "communication", "backward"])
    events = [event("expert", 0, 60, False, False), event("pipeline", 60, 90, True, False)]
    usage = report.measure(events, [(0, 100)], bubble=[(40, 80)])
    assert round(1e6 * usage.bubble_ms) == 40
    assert round(1e6 * usage.communication_ms) == 30
    assert round(1e6 * usage.exposed_ms) == 10
    assert in_ns(usage.phases) == {"expert": 40, "pipeline": 10}
    assert round(1e6 * usage.idle_ms) == 10
    assert usage.busy == pytest.approx(0.9)  # what a profiler calls busy
    assert in_ns(usage.op_ms) == {"expert": 60, "pipeline": 30}
