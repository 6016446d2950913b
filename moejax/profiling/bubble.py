"""The pipeline's bubble in a trace: the ticks of the schedule in which a device's stage has no microbatch.

The shift of activations to the next stage (`moejax.pipeline`) ends a tick, forward, and begins one, backward; it is in
the trace of every device, once a tick. Tick t of stage i has work where 0 <= t - i < repeats × microbatches, and the
backward pass goes through the ticks the other way round. In the others an accelerator computes what nobody uses, and a
virtual device waits: either way the time is lost, whatever layers' operations the trace shows there. (Those of other
phases, such as the embedding before the first tick of another stage ends, are not the bubble's.)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence

from moejax.layout import Layout
from moejax.planner.time import PIPELINED
from moejax.profiling.intervals import Interval, subtract, union
from moejax.profiling.trace import Event

_SHIFT = re.compile(r"ppermute|collective-permute|sendrecv", re.IGNORECASE)
_LAYERS = PIPELINED - {"pipeline"}  # what a tick does, without the loop around it


def find_bubble(
    events: Mapping[str, Sequence[Event]], stages: Mapping[str, int], layout: Layout, step: Interval
) -> dict[str, list[Interval]] | None:
    """The ticks without work in one step, by device; None where the trace does not show every tick's shift.

    Args:
      events: of each device, in any order; those outside of the step are left out.
      stages: device -> its place along the pipeline.
      layout: of the train step.
      step: when it ran, as the events' times.
    """
    if layout.mesh.pipeline == 1:
        return {device: [] for device in events}
    if not stages.keys() >= events.keys():
        return None
    inside = {device: [e for e in found if step[0] <= e.start_ns < step[1]] for device, found in events.items()}
    bubble: dict[str, list[Interval]] = {device: [] for device in events}
    for backward in (False, True):
        passes = _boundaries({d: [e for e in found if e.backward == backward] for d, found in inside.items()}, layout)
        if passes is None:
            return None
        for device, boundaries in passes:
            work = layout.pipeline_repeats * layout.num_microbatches
            for at, tick in enumerate(itertools.pairwise(boundaries)):
                t = len(boundaries) - 2 - at if backward else at
                if not 0 <= t - stages[device] < work:
                    bubble[device].append(tick)
    others = {
        d: union((e.start_ns, e.end_ns) for e in found if e.phase not in PIPELINED) for d, found in inside.items()
    }
    return {device: subtract(union(ticks), others[device]) for device, ticks in bubble.items()}


def _boundaries(events: Mapping[str, Sequence[Event]], layout: Layout) -> list[tuple[str, list[float]]] | None:
    """When each tick begins and the last one ends, for every device and slice of the batch; all events of one pass."""
    ticks, slices = layout.ticks, layout.grad_accumulation_steps
    shifts = {device: sorted(e.end_ns for e in found if _is_shift(e)) for device, found in events.items()}
    if any(len(found) != slices * ticks for found in shifts.values()):
        return None
    everything = [e for found in events.values() for e in found]
    backward = any(e.backward for e in everything)
    boundaries = []
    for first in range(0, slices * ticks, ticks):
        last = first + ticks - 1
        before = max((found[first - 1] for found in shifts.values()), default=None) if first else None
        after = min((found[last + 1] for found in shifts.values() if len(found) > last + 1), default=None)
        if backward:
            edge = _end(everything, min(found[last] for found in shifts.values()), after)
        else:
            edge = _start(everything, before, min(found[first] for found in shifts.values()))
        for device, found in shifts.items():
            inner = found[first : last + 1]
            boundaries.append((device, [*inner, max(edge, inner[-1])] if backward else [min(edge, inner[0]), *inner]))
    return boundaries


def _start(events: Iterable[Event], since: float | None, until: float) -> float:
    """When the first device has embedded its tokens, else when layers begin: they may have a cast before the loop."""
    found = _within(events, since, until)
    ends: dict[str, float] = {}
    for event in found:
        if event.phase == "embed":
            ends[event.device] = max(event.end_ns, ends.get(event.device, event.end_ns))
    return min(ends.values(), default=min((e.start_ns for e in found if e.phase in _LAYERS), default=until))


def _end(events: Iterable[Event], since: float, until: float | None) -> float:
    """When the last device is done with what layers do."""
    return max((e.end_ns for e in _within(events, since, until) if e.phase in _LAYERS), default=since)


def _within(events: Iterable[Event], since: float | None, until: float | None) -> list[Event]:
    """Those that begin in between."""
    return [e for e in events if (since is None or e.start_ns >= since) and (until is None or e.start_ns < until)]


def _is_shift(event: Event) -> bool:
    return event.phase == "pipeline" and event.communication and bool(_SHIFT.search(event.name))
