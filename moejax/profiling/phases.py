"""Which phase each instruction of a compiled program belongs to, by the scope that its metadata names.

The program runs under `jax.named_scope`s that are the phases of `moejax.planner.work.Phase`. XLA keeps an instruction's
scopes through all of its passes as `op_name="jit(step)/shard_map/transpose(jvp(attention))/dot_general"`. Of a loop's
transpose everything has a `transpose(`: it is the backward pass, with what it computes again.

A collective that XLA combined from several names them all, `jit(step)/(route/psum:loss/psum)`. It goes to the phase
named most often, as a fusion goes to the phase of most of its parts, where it has no name of its own. What XLA left
without any, such as copies and on CPUs the products in attention's loop over blocks, goes with what feeds it.

JAX's compilation cache takes programs for the same that differ in names alone: after a scope is renamed, a cached
program still has the old one.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import get_args

from moejax.hlo import COLLECTIVES, Instruction, Module
from moejax.planner.work import Phase

PHASES: tuple[str, ...] = get_args(Phase)
UNNAMED = "no phase"  # what stands in tables for none of them
_CONTAINERS = ("while", "conditional", "call")
_HOPS = 4  # back to an instruction that says its phase


@dataclasses.dataclass(frozen=True)
class Op:
    """What an instruction is. `phase` is None where nothing says it; `backward` includes what is computed again.

    A container (a loop, a branch, a call) runs other instructions, which are traced themselves: its time is theirs.
    """

    phase: str | None
    backward: bool
    communication: bool
    container: bool


def phase_of(op_name: str) -> str | None:
    """The innermost phase of a scope path; of several, combined into one operation, the most frequent."""
    combined = re.fullmatch(r".*?/\((.*)\)", op_name)
    return _most_frequent(map(_innermost, combined[1].split(":") if combined else [op_name]))


def _most_frequent(phases: Iterable[str | None]) -> str | None:
    votes = Counter(filter(None, phases))
    return votes.most_common(1)[0][0] if votes else None


def _innermost(op_name: str) -> str | None:
    """The last part is no scope but an operation, such as JAX's `gather`."""
    for part in reversed(op_name.split("/")[:-1]):
        for word in reversed(re.findall(r"\w+", part)):  # transpose(jvp(attention))
            if word in PHASES:
                return word
    return None


def ops(module: Module) -> dict[str, Op]:
    """Every instruction of a module by name."""
    found = {x.name: _op(module, x) for instructions in module.computations.values() for x in instructions.values()}
    return {
        x.name: found[x.name] if found[x.name].phase else _as_fed(instructions, x, found)
        for instructions in module.computations.values()
        for x in instructions.values()
    }


def _as_fed(instructions: Mapping[str, Instruction], x: Instruction, found: Mapping[str, Op]) -> Op:
    """`x` with the phase and pass of the nearest of what it is computed from, in its computation, that says them."""
    names, seen = [x.name], {x.name}
    for _ in range(_HOPS):
        operands = dict.fromkeys(o for name in names for o in instructions[name].operands if o in instructions)
        names = [name for name in operands if name not in seen]
        seen.update(names)
        for name in names:
            if found[name].phase:
                return dataclasses.replace(found[x.name], phase=found[name].phase, backward=found[name].backward)
    return found[x.name]


def op_from_event(name: str, opcode: str = "", op_name: str = "") -> Op:
    """What can be said of an operation without its program.

    Args:
      name: the instruction's; collectives are named by what they are, `all-reduce-start.3` or, by JAX, `all_gather.5`.
      opcode: where it is known.
      op_name: the scope path, where it is known.
    """
    opcode = opcode or re.sub(r"\.\d+$", "", name)
    named = name.replace("_", "-").startswith((*COLLECTIVES, "async-collective"))
    communication = named or opcode.startswith(COLLECTIVES)
    return Op(phase_of(op_name), "transpose(" in op_name, communication, opcode in _CONTAINERS)


def _op(module: Module, x: Instruction) -> Op:
    inside = [i for name in x.called for i in module.computations.get(name, {}).values()]
    path = scope_path(x)
    phase = phase_of(path)
    if phase is None and x.opcode == "fusion":  # what most of its parts say
        phase = _most_frequent(phase_of(scope_path(i)) for i in inside)
    wrapped = [i.opcode for i in inside] if x.opcode.startswith("async-") else []
    kinds = {opcode.removesuffix("-start").removesuffix("-done") for opcode in (x.opcode, *wrapped)}
    return Op(phase, "transpose(" in path, not kinds.isdisjoint(COLLECTIVES), x.opcode in _CONTAINERS)


def scope_path(x: Instruction) -> str:
    """The scopes that it was written in and its operation, `jit(step)/attention/dot_general`; empty if unknown."""
    found = re.search(r'op_name="([^"]*)"', x.attributes)
    return found[1] if found else ""
