"""Puts phases into a CPU trace's own file, so that TensorBoard's viewer shows them.

Of accelerators, XProf lays the scopes beside the operations by itself. Operations of XLA:CPU have only their
instruction's name; here each gets a name to be shown, "attention backward dot.12" for `dot.12`. The name that programs
read, `trace.read_trace` too, stays as it is. And the thread with the step markers, one among dozens, comes first.

A file is an `XSpace` of xplane.proto, edited as the bytes that it is (`moejax.profiling.wire`). Each kind of event is
named once in it, so this is cheap: 0.2 s for the 27 MB of two steps of the model `tiny`, and 0.3 s to read their
program.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from moejax.profiling.phases import Op
from moejax.profiling.trace import STEP
from moejax.profiling.wire import field, varint, walk

# Fields of xplane.proto
_PLANES = 1  # of XSpace
_PLANE_NAME, _LINES, _KINDS = 2, 3, 4  # of XPlane; kinds of events are entries of a map
_LINE_EVENTS, _LINE_PLACE = 4, 10  # of XLine
_EVENT_KIND = 1  # of XEvent
_VALUE = 2  # of an entry
_KIND_NAME, _KIND_SHOWN = 2, 4  # of XEventMetadata


def show_phases(file: Path, programs: Sequence[Mapping[str, Op]]) -> None:
    """Has the operations of a CPU trace shown with their phase, and its steps first, in place.

    Args:
      file: of the trace, an .xplane.pb.
      programs: what it ran, each as `phases.ops` gives it. Traces tell operations of one name in several programs
        apart by the event alone; such a name is left as it is where the programs' phases differ.
    """
    found: dict[str, set[str]] = {}
    for name, op in (item for program in programs for item in program.items()):
        found.setdefault(name, set()).add(" ".join(filter(None, (op.phase, "backward" if op.backward else "", name))))
    labels = {name.encode(): labels.pop().encode() for name, labels in found.items() if len(labels) == 1}

    def kind(message: bytes) -> bytes:
        label = labels.get(next(_contents(message, _KIND_NAME), b""))
        return message if label is None else message + field(_KIND_SHOWN, label)

    def plane(message: bytes) -> bytes:
        if next(_contents(message, _PLANE_NAME), b"") != b"/host:CPU":
            return message
        values = (next(_contents(entry, _VALUE)) for entry in _contents(message, _KINDS))
        steps = [value for value in values if next(_contents(value, _KIND_NAME), b"") == STEP.encode()]
        marks = tuple(_event_start(step) for step in steps)

        def line(message: bytes) -> bytes:
            if not any(mark in message for mark in marks):  # nearly all lines, which are long
                return message
            marked = any(event.startswith(marks) for event in _contents(message, _LINE_EVENTS))
            return message + varint(_LINE_PLACE << 3) + varint(1) if marked else message

        message = _edit(message, _LINES, line)
        return _edit(message, _KINDS, lambda entry: _edit(entry, _VALUE, kind))

    written = file.with_suffix(".tmp")  # all at once or not at all, whatever kills the process
    written.write_bytes(_edit(file.read_bytes(), _PLANES, plane))
    written.replace(file)


def _edit(message: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """`message` with the content of each of its fields of that number changed."""
    parts, kept = [], 0
    for found, _, begin, content, end in walk(message):
        if found == number:
            parts += [message[kept:begin], field(number, change(message[content:end]))]
            kept = end
    return b"".join([*parts, message[kept:]])


def _contents(message: bytes, number: int) -> Iterator[bytes]:
    """The contents of the fields of that number."""
    return (message[content:end] for found, _, _, content, end in walk(message) if found == number)


def _event_start(kind: bytes) -> bytes:
    """How an event of that kind begins: with the kind's number, a field that both have first."""
    _, _, _, content, end = next(walk(kind))
    return varint(_EVENT_KIND << 3) + kind[content:end]
