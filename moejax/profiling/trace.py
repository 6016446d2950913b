"""Reads an XPlane trace, as `moejax.profiling.capture` writes it, into plain events.

What a trace holds (jax 0.10.2, looked at):

- XLA:CPU: one plane `/host:CPU`, a line for each thread. An operation (a thunk) is an event with `hlo_op` and
  `device_ordinal`; a thread runs several devices' operations in turn. That of a collective lasts until the others have
  come: it holds the wait for them.
- GPU: a plane `/device:GPU:n` for each, a line `Stream #...` for each stream, an event for each kernel with `hlo_op`.
  Collectives are kernels named nccl... . Kernels that a CUDA graph starts may have no `hlo_op`, so no phase.
- A step marker (`jax.profiler.StepTraceAnnotation`) is an event of a host's thread with `step_num`.

An operation's phase is looked up by its name in the compiled program's text (`moejax.profiling.phases`), which
`capture` saves beside the trace; the events themselves do not say.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from moejax import hlo
from moejax.config import ConfigError
from moejax.profiling.phases import Op, ops

FACTS = "capture.json"
STEP = "train"  # the name of the step markers
_GPU = re.compile(r"/device:GPU:(\d+)")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One operation on one device; times in ns since its host's first step began. No `phase` where nothing says it."""

    device: str  # "CPU 3", "GPU 0"; of several hosts "host GPU 0"
    line: str  # the thread or stream
    name: str
    start_ns: float
    duration_ns: float
    phase: str | None
    backward: bool
    communication: bool

    @property
    def end_ns(self) -> float:
        return self.start_ns + self.duration_ns


@dataclasses.dataclass(frozen=True)
class Marker:
    """One step as its host saw it; times as an event's."""

    step: int
    start_ns: float
    end_ns: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """Operations of all devices, step markers in order, and what `capture` noted beside them (see `Recording.step`)."""

    platform: str  # "cpu" or "gpu"
    events: list[Event]
    steps: list[Marker]
    facts: Mapping[str, Any]


def read_trace(directory: str | Path) -> Trace:
    """Reads the newest trace under a directory that `moejax.profiling.capture` wrote, of all hosts.

    Raises:
      ConfigError: there is no trace, or none with operations of a CPU or a GPU.
    """
    directory = Path(directory).expanduser()
    files = sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    if not files:
        raise ConfigError(f"{directory} has no plugins/profile/*/*.xplane.pb; give a directory that capture() wrote")
    files = [file for file in files if file.parent == files[-1].parent]
    facts_file = directory / FACTS
    facts = json.loads(facts_file.read_text()) if facts_file.exists() else {}
    programs = {name: ops(hlo.parse((directory / name).read_text())) for name in {*_programs(facts).values()}}
    by_step = {step: programs[name] for step, name in _programs(facts).items()}
    events: list[Event] = []
    steps: list[Marker] = []
    for file in files:
        host = f"{file.name.removesuffix('.xplane.pb')} " if len(files) > 1 else ""
        data = jax.profiler.ProfileData.from_file(str(file))
        steps = steps or read_steps(data)[0]
        events += read_events(data, by_step, host)
    if not events:
        raise ConfigError(f"{directory} has no operations of a CPU or a GPU in its trace; other devices are not read")
    platform = "gpu" if any("GPU" in event.device for event in events) else "cpu"
    return Trace(platform, events, steps, facts)


def _programs(facts: Mapping[str, Any]) -> dict[int, str]:
    """Step -> the file of the program that it ran."""
    return {step["step"]: step["program"] for step in facts.get("steps", ())}


def read_steps(data: Any) -> tuple[list[Marker], float]:
    """The step markers of a `jax.profiler.ProfileData` in order, and when the first began, ns of the trace's clock."""
    found = sorted(
        (event.start_ns, event.duration_ns, int(dict(event.stats)["step_num"]))
        for plane in data.planes
        if plane.name == "/host:CPU"
        for line in plane.lines
        for event in line.events
        if event.name == STEP
    )
    origin = found[0][0] if found else 0.0
    return [Marker(number, start - origin, start - origin + duration) for start, duration, number in found], origin


def read_events(data: Any, programs: Mapping[int, Mapping[str, Op]], host: str = "") -> Iterator[Event]:
    """The operations of a `jax.profiler.ProfileData`, without containers.

    Args:
      data: the trace of one host.
      programs: step -> the operations of the program that it ran; those of other steps have no phase. An operation
        belongs to the last step that began before it.
      host: put before the devices' names.
    """
    steps, origin = read_steps(data)
    starts = [marker.start_ns for marker in steps]
    unknown = Op(None, False, False, False)
    for device, line, event, stats in _operations(data):
        start = event.start_ns - origin
        at = bisect.bisect_right(starts, start) - 1
        program = programs.get(steps[at].step, {}) if at >= 0 else {}
        op = program.get(stats.get("hlo_op", ""), unknown)
        if op.container:
            continue
        communication = op.communication or "nccl" in event.name.lower()
        yield Event(host + device, line, event.name, start, event.duration_ns, op.phase, op.backward, communication)


def _operations(data: Any) -> Iterable[tuple[str, str, Any, dict[str, Any]]]:
    """Device, line, event and its stats of everything that a device ran."""
    for plane in data.planes:
        gpu = _GPU.fullmatch(plane.name)
        for line in plane.lines:
            if gpu and line.name.startswith("Stream"):  # other lines repeat them
                for event in line.events:
                    yield f"GPU {gpu[1]}", line.name, event, dict(event.stats)
            elif plane.name == "/host:CPU":
                for event in line.events:
                    stats = dict(event.stats)
                    if "hlo_op" in stats and "device_ordinal" in stats:
                        yield f"CPU {stats['device_ordinal']}", line.name, event, stats
