"""Reads an XPlane trace, as `moejax.profiling.capture` writes it, into plain events.

What a trace holds:

- XLA:CPU: one plane `/host:CPU`, a line for each thread. An operation (a thunk) is an event with `hlo_op` and
  `device_ordinal`; a thread runs several devices' operations in turn. That of a collective lasts until the others have
  come: it holds the wait for them.
- GPU: a plane `/device:GPU:n` for each, one without events where it did nothing; a line `Stream #16(Compute,MemcpyD2D)`
  for each stream, an event for each kernel and copy. What a program started has `hlo_op` and `name`, the scope path;
  copies that the host asked for have neither, so no phase. Collectives are kernels named nccl..., RCCL's too, or copies
  between devices, MemcpyP2P. All else in such a plane ("Steps", "TensorFlow Ops") repeats the streams. Kernels of a
  command buffer (CUDA graph; on by default) are all said to be of the buffer, and have no phase either:
  --config.compiler_options=xla_gpu_enable_command_buffer= turns them off for a run to be traced (xprof's issues 2544
  and 3070).
- TPU: a plane `/device:TPU:n` for each chip. The line "XLA Ops" has what its core does, one after the other, loops
  around what they run; an event is named by its instruction's whole text but for the metadata. "Async XLA Ops" has
  what goes on beside it, from a start to its done; the wait for it is the done. Of these we read collectives: that a
  copy goes on says nothing of a chip's time. `tf_op`, the scope path, belongs to the event's kind, which `ProfileData`
  doesn't show, so that phases come from the program's text alone.
- A step marker (`jax.profiler.StepTraceAnnotation`) is an event of a host's thread with `step_num`.

An operation's phase is looked up by its name in the compiled program's text (`moejax.profiling.phases`), which
`capture` saves beside the trace; where there is none, or not this operation, in the event's own scope path.

Looked at, of what others recorded: JAX on eight MI300X (0.8 and one before it) and on MI350X (2026), without
collectives; JAX on four TPU v6e (2025), with all-reduces and copies to the host; TensorFlow on V100 (2020). None was of
JAX on NVIDIA's devices: streams' names, `hlo_op`, `name` and MemcpyP2P there are as XLA's sources have them.
"""

from __future__ import annotations

import bisect
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from moejax import hlo
from moejax.checks import ConfigError, check, expand
from moejax.profiling.phases import Op, op_from_event, ops

FACTS = "capture.json"
STEP = "train"  # the name of the step markers
_DEVICE = re.compile(r"/device:(GPU|TPU):(\d+)")
_TPU_OPS, _TPU_ASYNC = "XLA Ops", "Async XLA Ops"
_TPU_NAME = re.compile(r"%?([\w.-]+) = .*? ([a-z][\w-]*)\(")


@dataclasses.dataclass(frozen=True, slots=True)
class Event:
    """One operation on one device; times in ns since its host's first step began. No `phase` where nothing says it."""

    device: str  # "CPU 3", "GPU 0", "TPU 0"; of several hosts "host GPU 0"
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

    platform: str  # "cpu", "gpu" or "tpu"
    events: list[Event]
    steps: list[Marker]
    facts: Mapping[str, Any]


def read_trace(directory: str | Path) -> Trace:
    """Reads the newest trace under a directory that `moejax.profiling.capture` wrote, of all hosts.

    Raises:
      ConfigError: there is no trace, or none that is whole and has operations of a CPU, GPU or TPU.
    """
    directory = expand(directory)
    files = trace_files(directory)
    if not files:
        raise ConfigError(
            f"{directory} has no plugins/profile/*/*.xplane.pb; give a directory that train.py --profile_steps or "
            "moejax.profiling.capture wrote"
        )
    facts_file = directory / FACTS
    facts = _read_facts(facts_file) if facts_file.exists() else {}
    files_of_programs = {name: directory / name for name in {*_programs(facts).values()}}
    for file in files_of_programs.values():
        check(file.exists(), f"{file} is not there, which {facts_file} names; copy the trace's whole directory")
    programs = {name: ops(hlo.parse(file.read_text())) for name, file in files_of_programs.items()}
    by_step = {step: programs[name] for step, name in _programs(facts).items()}
    events: list[Event] = []
    steps: list[Marker] = []
    for file in files:
        host = f"{file.name.removesuffix('.xplane.pb')} " if len(files) > 1 else ""
        data = _read_file(file)
        steps = steps or read_steps(data)[0]
        events += read_events(data, by_step, host)
    if not events:
        raise ConfigError(f"{directory} has no operations of a CPU, GPU or TPU in its trace; it reads no others")
    platform = next(kind for kind in ("tpu", "gpu", "cpu") if any(_is_of(kind, event) for event in events))
    events = [event for event in events if _is_of(platform, event)]  # not what the host of a GPU ran by XLA
    return Trace(platform, events, steps, facts)


def _read_facts(file: Path) -> dict[str, Any]:
    try:
        facts = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); copy the trace's whole directory") from None
    steps = facts.get("steps", []) if isinstance(facts, dict) else None
    whole = isinstance(steps, list) and all(
        isinstance(step, dict) and {"step", "program"} <= step.keys() for step in steps
    )
    check(whole, f"{file} is not what moejax.profiling.capture wrote; copy the trace's whole directory")
    return facts


def trace_files(directory: Path) -> list[Path]:
    """The files of the newest trace under a directory, one a host, where TensorBoard looks for them."""
    files = sorted(directory.glob("plugins/profile/*/*.xplane.pb"))
    return [file for file in files if file.parent == files[-1].parent]


def _read_file(file: Path) -> Any:
    try:
        return jax.profiler.ProfileData.from_file(str(file))
    except RuntimeError as error:
        raise ConfigError(f"{file} is no whole trace ({error}); copy it again, or trace again") from None


def _is_of(platform: str, event: Event) -> bool:
    return event.device.split(" ")[-2] == platform.upper()


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
        if event.name == STEP and "step_num" in dict(event.stats)
    )
    origin = found[0][0] if found else 0.0
    return [Marker(number, start - origin, start - origin + duration) for start, duration, number in found], origin


def read_events(data: Any, programs: Mapping[int, Mapping[str, Op]], host: str = "") -> Iterator[Event]:
    """The operations of a `jax.profiler.ProfileData`, without containers.

    Args:
      data: the trace of one host.
      programs: step -> the operations of the program that it ran; of others is known what their events say. An
        operation belongs to the last step that began before it.
      host: put before the devices' names.
    """
    steps, origin = read_steps(data)
    starts = [marker.start_ns for marker in steps]
    for device, line, event, name, said in _operations(data):
        start = event.start_ns - origin
        at = bisect.bisect_right(starts, start) - 1
        program = programs.get(steps[at].step, {}) if at >= 0 else {}
        op = program.get(name, said)
        if op.container and not device.startswith("GPU"):  # there it is a copy that a loop makes itself
            continue
        communication = op.communication or said.communication
        if line == _TPU_ASYNC and not communication:
            continue
        phase, backward = op.phase or said.phase, op.backward or said.backward
        shown = name if device.startswith("TPU") else event.name
        yield Event(host + device, line, shown, start, event.duration_ns, phase, backward, communication)


def _operations(data: Any) -> Iterator[tuple[str, str, Any, str, Op]]:
    """Device, line, event, the instruction's name and what the event says of it, of everything that a device ran."""
    for plane in data.planes:
        device = _DEVICE.fullmatch(plane.name)
        if device:
            read = {"GPU": _read_gpu, "TPU": _read_tpu}[device[1]]
            for line, event, name, said in read(plane):
                yield f"{device[1]} {device[2]}", line, event, name, said
        elif plane.name == "/host:CPU":
            yield from _read_cpu(plane)


def _read_cpu(plane: Any) -> Iterator[tuple[str, str, Any, str, Op]]:
    for line in plane.lines:
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_op" in stats and "device_ordinal" in stats:
                name = stats["hlo_op"]
                yield f"CPU {stats['device_ordinal']}", line.name, event, name, op_from_event(name)


def _read_gpu(plane: Any) -> Iterator[tuple[str, Any, str, Op]]:
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            stats = dict(event.stats)
            name = stats.get("hlo_op", "")
            said = op_from_event(name, op_name=stats.get("name", ""))
            between_devices = "nccl" in event.name.lower() or event.name.startswith("MemcpyP2P")
            yield line.name, event, name, dataclasses.replace(said, communication=said.communication or between_devices)


def _read_tpu(plane: Any) -> Iterator[tuple[str, Any, str, Op]]:
    for line in plane.lines:
        if line.name not in (_TPU_OPS, _TPU_ASYNC):
            continue
        for event in line.events:
            found = _TPU_NAME.match(event.name)
            name, opcode = found.groups() if found else (event.name, "")
            yield line.name, event, name, op_from_event(name, opcode)
