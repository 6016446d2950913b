"""A CPU trace shows phases in TensorBoard, and lies where its plugin looks for traces."""

import jax
import jax.numpy as jnp
import pytest

from moejax.profiling import capture
from moejax.profiling.phases import Op
from moejax.profiling.trace import read_trace, trace_files
from moejax.profiling.viewer import show_phases


def space(plane, name, shown=""):
    """A trace of one event, with a lot in it that is no concern of the labels."""
    text = f"""
        errors: "none" hostnames: "here"
        planes {{ id: 300 name: "{plane}"
            lines {{ id: 7 timestamp_ns: 1795395493073339757 name: "tf_XLAEigen"
                events {{ metadata_id: 529 offset_ps: 5000 stats {{ metadata_id: 3 double_value: 0.5 }} }} }}
            event_metadata {{ key: 529 value {{ id: 529 name: "{name}" {shown} }} }}
            stat_metadata {{ key: 3 value {{ id: 3 name: "{name}" }} }} }}
        planes {{ name: "{"x" * 300}" }}
    """
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)


def op(phase, backward=False):
    return Op(phase, backward, communication=False, container=False)


@pytest.mark.parametrize(
    ("plane", "programs", "shown"),
    [
        ("/host:CPU", [{"dot.12": op("attention")}], "attention dot.12"),
        ("/host:CPU", [{"dot.12": op("attention", backward=True)}, {}], "attention backward dot.12"),
        ("/host:CPU", [{"dot.12": op("expert")}, {"dot.12": op("expert")}], "expert dot.12"),
        ("/host:CPU", [{"dot.12": op(None)}], "dot.12"),
        ("/host:CPU", [{"dot.12": op("expert")}, {"dot.12": op("loss")}], None),  # one of them, but which?
        ("/host:CPU", [{"dot.13": op("expert")}], None),
        ("/device:GPU:0", [{"dot.12": op("expert")}], None),
    ],
)
def test_an_operation_is_shown_with_its_phase_and_nothing_else_is_touched(tmp_path, plane, programs, shown):
    file = tmp_path / "host.xplane.pb"
    file.write_bytes(space(plane, "dot.12"))
    show_phases(file, programs)
    assert file.read_bytes() == space(plane, "dot.12", f'display_name: "{shown}"' if shown else "")


def test_the_line_with_the_step_markers_comes_first(tmp_path):
    def text(place):
        events = "events { metadata_id: 2 duration_ps: 9 } events { metadata_id: 301 duration_ps: 5 }"
        others = "events { metadata_id: 2 duration_ps: 301 }"
        return f"""planes {{ name: "/host:CPU"
            lines {{ id: 9 name: "tf_XLAEigen" {others} }} lines {{ id: 8 name: "python" {events} {place} }}
            event_metadata {{ key: 301 value {{ id: 301 name: "train" }} }} }}"""

    file = tmp_path / "host.xplane.pb"
    file.write_bytes(jax.profiler.ProfileData.text_proto_to_serialized_xspace(text("")))
    show_phases(file, [])
    assert file.read_bytes() == jax.profiler.ProfileData.text_proto_to_serialized_xspace(text("display_id: 1"))


def test_a_trace_has_phases_and_lies_where_tensorboard_looks(tmp_path):
    """Its plugin takes every LOGDIR/.../plugins/profile/RUN/HOST.xplane.pb, and shows the run as .../RUN."""

    def f(x):
        with jax.named_scope("attention"):
            return jnp.sum(jnp.sin(x @ x))

    x = jnp.ones((64, 64))
    compiled = jax.jit(jax.grad(f)).lower(x).compile()
    directory = tmp_path / "profiles" / "step_000010"
    with capture(directory) as recording, recording.step(10, compiled):
        compiled(x).block_until_ready()
    (file,) = tmp_path.rglob("*.xplane.pb")
    assert [file] == trace_files(directory)
    assert file.relative_to(directory).parts[:2] == ("plugins", "profile")
    assert len(file.relative_to(directory).parts) == 4
    events = [event for event in read_trace(directory).events if event.phase]
    assert {event.phase for event in events} == {"attention"}
    assert {event.backward for event in events} == {False, True}
    for event in events:
        label = f"attention {'backward ' if event.backward else ''}{event.name}"
        assert label.encode() in file.read_bytes()
