"""How much of a compiled program's communication runs while matrix products do, read off its schedule.

Nothing is run. XLA schedules an asynchronous collective as a start and a done; what stands between the two runs
meanwhile. Three questions, each harder than the one before, are asked of every byte that leaves a device:

1. Is it sent asynchronously?
2. Does matrix work stand between its start and its done?
3. Is there enough of it? A computation is played through in order on one device with two clocks, one of matrix products
   at `flops_per_s` and one of a link at `bytes_per_s` that sends one thing after the other; at a done the device waits
   for what the link has not sent yet. What is not waited for is hidden. Everything but matrix products takes no time
   here, so that real programs hide more; and products run at their full speed, so that real programs hide more again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from moejax.hlo import Instruction, Module, collective
from moejax.kernels.attention.cost import custom_call_flops


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective of the program, run `times` times; bytes and seconds are of one run."""

    name: str
    kind: str
    times: int
    sent_bytes: float
    asynchronous: bool
    flops: float  # of the matrix products between start and done
    waited_s: float


@dataclasses.dataclass(frozen=True)
class Overlap:
    """The collectives of one kind together: bytes that a device sends in one run of the program, and parts of them."""

    times: int
    sent_bytes: float
    asynchronous: float  # part of the bytes
    overlapped: float  # part of the bytes: asynchronous, with matrix work between start and done
    hidden: float  # part of the time that the link needs
    waited_s: float


def attention_flops(seq_len: int) -> Callable[[Instruction], float]:
    """FLOPs of the custom calls of causal attention on `seq_len` tokens, for `moejax.hlo.parse`; 0 for other calls."""
    return lambda call: custom_call_flops(call.attributes, seq_len)


def measure(module: Module, *, flops_per_s: float, bytes_per_s: float) -> dict[str, Overlap]:
    """The overlap of a program by kind of collective, see `moejax.hlo.COLLECTIVES`; kinds that send nothing are absent.

    Args:
        module: the compiled program.
        flops_per_s: matrix products of a device.
        bytes_per_s: what a device sends to others, in all.
    """
    by_kind: dict[str, list[Transfer]] = {}
    for transfer in transfers(module, flops_per_s=flops_per_s, bytes_per_s=bytes_per_s):
        if transfer.sent_bytes:
            by_kind.setdefault(transfer.kind, []).append(transfer)
    return {kind: _sum_up(found, bytes_per_s) for kind, found in sorted(by_kind.items())}


def _sum_up(found: list[Transfer], bytes_per_s: float) -> Overlap:
    total = sum(t.times * t.sent_bytes for t in found)
    waited_s = sum(t.times * t.waited_s for t in found)
    return Overlap(
        times=sum(t.times for t in found),
        sent_bytes=total,
        asynchronous=sum(t.times * t.sent_bytes for t in found if t.asynchronous) / total,
        overlapped=sum(t.times * t.sent_bytes for t in found if t.asynchronous and t.flops) / total,
        hidden=max(0.0, 1 - waited_s / (total / bytes_per_s)),  # it may wait for other kinds' bytes, too
        waited_s=waited_s,
    )


def transfers(module: Module, *, flops_per_s: float, bytes_per_s: float) -> list[Transfer]:
    """Every collective of the program, in order of the schedule; a loop's once, with `times` counted."""
    found: list[Transfer] = []

    def visit(computation: str, times: int) -> None:
        found.extend(_play(module, computation, times, flops_per_s, bytes_per_s))
        for x in module.computations[computation].values():
            if x.opcode in ("while", "conditional", "call"):
                inside = times * (module.trip_count(x) if x.opcode == "while" else 1)
                for name in x.called:
                    visit(name, inside)

    visit(module.entry, 1)
    return found


def _play(module: Module, name: str, times: int, flops_per_s: float, bytes_per_s: float) -> list[Transfer]:
    """The transfers of one computation, with the time that it waits for each."""
    instructions = module.computations[name]
    found: list[Transfer] = []
    started: dict[str, tuple[Transfer, float, float]] = {}  # by start: when it is through, FLOPs until it began
    clock = link = flops = 0.0
    for x in instructions.values():
        begun = collective(module, name, x)
        if begun:
            link = max(clock, link) + begun.sent_bytes / bytes_per_s
            transfer = Transfer(x.name, begun.kind, times, begun.sent_bytes, begun.asynchronous, 0.0, 0.0)
            if begun.asynchronous:
                started[x.name] = transfer, link, flops
                continue
            found.append(dataclasses.replace(transfer, waited_s=link - clock))
            clock = link
        elif start := _start_of(x, instructions):
            if start in started:
                transfer, through, before = started.pop(start)
                wait = max(0.0, through - clock)
                found.append(dataclasses.replace(transfer, flops=flops - before, waited_s=wait))
                clock += wait
        else:
            work = module.flops(name, x)
            flops, clock = flops + work, clock + work / flops_per_s
    return found


def _start_of(x: Instruction, instructions: dict[str, Instruction]) -> str | None:
    """The start that belongs to a done, past any updates between them."""
    if not x.opcode.endswith("-done"):
        return None
    start = instructions[x.operands[0]]
    while start.opcode.endswith("-update"):
        start = instructions[start.operands[0]]
    return start.name
