"""The pipeline's bubble, found in traces written out by hand with ticks of known lengths."""

import dataclasses

import pytest

from moejax.layout import Layout
from moejax.mesh import MeshConfig
from moejax.profiling.bubble import find_bubble
from moejax.profiling.trace import Event

TICK = 100.0  # ns


def layout(stages=2, microbatches=3, repeats=1, slices=1):
    return Layout(
        MeshConfig(pipeline=stages), 16, microbatches * slices, slices,
        num_microbatches=microbatches, pipeline_repeats=repeats,
    )  # fmt: skip


def op(device, phase, start, end, backward=False, name="fusion"):
    communication = name != "fusion"
    return Event(device, "line", name, start, end - start, phase, backward, communication)


def trace_of(x, shift="ppermute.1"):
    """Each tick a layer's work or nothing, then a shift in its last 10 ns; backward the shift comes first.

    Returns the events by device, and of each device when it has no work.
    """
    work = x.pipeline_repeats * x.num_microbatches
    ticks = work + x.mesh.pipeline - 1
    events, bubble, now = {}, {}, 50.0
    for stage in range(x.mesh.pipeline):
        device = f"CPU {stage}"
        found, idle, now = [op(device, "embed", 0, 50)], [], 50.0
        for _ in range(x.grad_accumulation_steps):
            for backward in (False, True):
                for at in range(ticks):
                    t = ticks - 1 - at if backward else at
                    works = 0 <= t - stage < work
                    begin, end = (now + 10, now + TICK) if backward else (now, now + TICK - 10)
                    if works:
                        found.append(op(device, "expert", begin, end, backward))
                    edge = (now, begin) if backward else (end, now + TICK)
                    found.append(op(device, "pipeline", *edge, backward, shift))
                    if not works:  # up to the end of the next shift
                        idle.append((begin, end + 10) if backward and at < ticks - 1 else (begin, now + TICK))
                    now += TICK
                found.append(op(device, "loss", now, now + 30, backward))
                now += 30
        events[device], bubble[device] = found, idle
    return events, bubble, now


def stages_of(events):
    return {device: int(device.split()[1]) for device in events}


def length(intervals):
    return sum(end - start for start, end in intervals)


@pytest.mark.parametrize(
    "x", [layout(), layout(4, 2), layout(2, 2, repeats=2), layout(3, 4, slices=2)],
    ids=["two stages", "four stages", "interleaved", "accumulated"],
)  # fmt: skip
@pytest.mark.parametrize("shift", ["ppermute.1", "ncclDevKernel_SendRecv(args)"])
def test_the_ticks_without_work(x, shift):
    events, bubble, end = trace_of(x, shift)
    found = find_bubble(events, stages_of(events), x, (0, end))
    for device, ticks in bubble.items():
        assert length(found[device]) == pytest.approx(length(ticks), abs=20 * x.grad_accumulation_steps)
        assert len(found[device]) > 0
        for start, stop in ticks:
            middle = (start + stop) / 2
            assert any(a <= middle <= b for a, b in found[device])


def test_one_stage_has_none():
    events = {"CPU 0": [op("CPU 0", "expert", 0, 10)]}
    assert find_bubble(events, {}, layout(1), (0, 100)) == {"CPU 0": []}


def test_what_cannot_be_told():
    events, _, end = trace_of(layout())
    assert find_bubble(events, {"CPU 0": 0}, layout(), (0, end)) is None  # a device's stage is not known
    assert find_bubble(events, stages_of(events), layout(microbatches=4), (0, end)) is None  # a tick too few
    unnamed = {d: [dataclasses.replace(e, phase=None) for e in found] for d, found in events.items()}
    assert find_bubble(unnamed, stages_of(events), layout(), (0, end)) is None
