"""Holds a compiled step's memory against the device's, and steps down a ladder where it does not fit.

Every rung computes the same step, to rounding, in less memory and more time:

1. smaller microbatches: more `num_microbatches`, then more `accumulate`, down to one sequence on a device;
2. stronger rematerialization: `none`, `minimal`, `collectives`, `full`.

What would change the loss is left out: smaller microbatches under the strategy "capacity", whose drops are counted in
each.

Tried and left: host offload of the layers' inputs (`jax.checkpoint_policies.save_and_offload_only_these_names` to
"pinned_host"), in both checkpoints, for H100 also in the pipeline's alone. Compiled ahead of time with jax 0.10.2, XLA
fails on H100 ("Expected instruction to have shape equal to") and on v5p ("async-start expects the shape of operand 0 to
match"): it does not follow a stack in host memory through the loop over layers inside the loop over ticks. CPUs ignore
it: the same program comes out.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any

import jax
from absl import logging

from moejax.config import ConfigError
from moejax.mesh import PIPELINE, TENSOR
from moejax.train.step import TrainStep

REMAT_LADDER = ("none", "minimal", "collectives", "full")


class DoesNotFitError(ConfigError):
    """No way of doing the step fits in a device's memory: the message names what takes most, and what would fit."""


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of one device that a compiled step takes, by XLA's own count."""

    arguments: int  # parameters, moments and the batch
    outputs: int  # what is not in the arguments' place
    temporaries: int
    peak: int  # as XLA says; on CPU without temporaries

    @classmethod
    def of(cls, compiled: Any) -> MemoryUse:
        m = compiled.memory_analysis()
        outputs = m.output_size_in_bytes - m.alias_size_in_bytes
        return cls(m.argument_size_in_bytes, outputs, m.temp_size_in_bytes, m.peak_memory_in_bytes)

    @property
    def total(self) -> int:
        """Arguments, outputs and temporaries: on CPU XLA's own peak leaves temporaries out."""
        return max(self.arguments + self.outputs + self.temporaries, self.peak)

    @property
    def largest(self) -> str:
        """The largest category, in words."""
        parts = {
            "arguments (parameters, moments, batch)": self.arguments,
            "outputs": self.outputs,
            "temporaries (activations, gradients, buffers)": self.temporaries,
        }
        name = max(parts, key=lambda part: parts[part])
        return f"{name}, {_mib(parts[name])}"


@dataclasses.dataclass(frozen=True)
class FittedStep:
    """A compiled step, called as its `TrainStep` is, which may be further down the ladder than what was asked for."""

    compiled: Any
    step: TrainStep
    memory: MemoryUse

    def __call__(self, state: Any, batch: Any) -> Any:
        return self.compiled(state, batch)


def device_limit(mesh: jax.sharding.Mesh) -> int:
    """Bytes that a step may take on a device of the mesh, as its runtime says; 0 where it does not (CPUs)."""
    device = mesh.local_mesh.devices.flat[0]
    return int((device.memory_stats() or {}).get("bytes_limit", 0))


def memory_in_use(mesh: jax.sharding.Mesh) -> int:
    """The most bytes that were in use on a device of the mesh so far, as its runtime says; 0 where it does not (CPUs).

    The most so far, for between two steps only the state is there.
    """
    device = mesh.local_mesh.devices.flat[0]
    return int((device.memory_stats() or {}).get("peak_bytes_in_use", 0))


def fit(step: TrainStep, batch_size: int, seq_len: int, limit_bytes: int, *, refused: bool = False) -> FittedStep:
    """Compiles `step`, or the first one down the ladder that needs at most `limit_bytes` (0: no limit) on a device.

    `refused` says that `step` itself is known not to. The compiler's own refusal for want of memory (TPUs) counts as
    not fitting; any other error is raised.

    Raises:
        DoesNotFitError: naming the largest category and what would fit, if the last rung does not.
    """
    memory: MemoryUse | None = None
    rungs = ladder(step, batch_size, seq_len)
    for rung in rungs if refused else itertools.chain((step,), rungs):
        if rung is not step:
            _log_step_down(step, rung, seq_len, memory, limit_bytes)
            step = rung
        try:
            compiled = rung.lower(batch_size, seq_len).compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            memory = None
            continue
        memory = MemoryUse.of(compiled)
        if not limit_bytes or memory.total <= limit_bytes:
            return FittedStep(compiled, rung, memory)
    raise DoesNotFitError(_refusal(step, batch_size, seq_len, memory, limit_bytes))


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether XLA's status is that memory ran out."""
    return str(error).startswith("RESOURCE_EXHAUSTED")


def ladder(step: TrainStep, batch_size: int, seq_len: int) -> Iterator[TrainStep]:
    """The rungs below `step`, from the cheapest: each keeps what those above it have changed."""
    program = step.program
    same_loss = program.dispatch.strategy != "capacity"
    while same_loss and (factor := _least_factor(_sequences(step, batch_size))) > 1:
        step = _changed(step, num_microbatches=step.program.parallel.num_microbatches * factor)
        yield step
    while same_loss and (factor := _least_factor(step.program.parallel.num_microbatches)) > 1:
        fewer = step.program.parallel.num_microbatches // factor
        if program.parallel.repeats > 1 and fewer < program.mesh.shape[PIPELINE]:
            break  # interleaving needs one for each stage
        # As many microbatches in more passes, each of which keeps the activations of fewer of them.
        step = _changed(step, step.accumulate * factor, num_microbatches=fewer)
        yield step
    policy = program.parallel.remat_policy(seq_len)
    for stronger in REMAT_LADDER[REMAT_LADDER.index(policy) + 1 :]:
        step = _changed(step, remat=stronger)
        yield step


def _changed(step: TrainStep, accumulate: int = 0, **fields: Any) -> TrainStep:
    parallel = dataclasses.replace(step.program.parallel, **fields)
    program = dataclasses.replace(step.program, parallel=parallel)
    return TrainStep(program, step.config, step.steps, accumulate or step.accumulate)


def _sequences(step: TrainStep, batch_size: int) -> int:
    """Into how many parts a device's share of a microbatch can be cut."""
    program = step.program
    parts = [program.mesh.shape[axis] for axis in program.batch_axes]
    parts += [step.accumulate, program.parallel.num_microbatches, max(1, program.parallel.batch_split)]
    if program.model.num_dense_layers:
        parts.append(program.mesh.shape[PIPELINE])
    return batch_size // math.prod(parts)


def _least_factor(number: int) -> int:
    """The least prime factor, 1 of 1."""
    return next((factor for factor in range(2, number + 1) if number % factor == 0), 1)


def _describe(step: TrainStep, seq_len: int) -> str:
    parallel = step.program.parallel
    return (
        f"num_microbatches={parallel.num_microbatches} accumulate={step.accumulate} "
        f"remat={parallel.remat_policy(seq_len)}"
    )


def _log_step_down(step: TrainStep, rung: TrainStep, seq_len: int, memory: MemoryUse | None, limit_bytes: int) -> None:
    logging.warning(
        "Memory guard, %d tokens: %s needs %s, limit %s; stepping down to %s",
        seq_len, _describe(step, seq_len), _needs(memory), _limit(limit_bytes), _describe(rung, seq_len),
    )  # fmt: skip


def _refusal(step: TrainStep, batch_size: int, seq_len: int, memory: MemoryUse | None, limit_bytes: int) -> str:
    """One line: what the last rung needs, of which most for what, and the smallest change that would fit."""
    needs = f"a step of {batch_size} sequences of {seq_len} tokens needs {_needs(memory)} a device"
    at = f"with {_describe(step, seq_len)}, where the ladder ends"
    if memory is None:
        return f"{needs} {at}; use a smaller batch, shorter sequences or more devices"
    return f"{needs} {at}, and the limit is {_limit(limit_bytes)}; the most is {memory.largest}; " + _smallest_change(
        step, batch_size, seq_len, memory, limit_bytes
    )


def _smallest_change(step: TrainStep, batch_size: int, seq_len: int, memory: MemoryUse, limit_bytes: int) -> str:
    """What to change, by proportion: temporaries go with the tokens, everything with the number of devices."""
    mesh, share = step.program.mesh, 1 - (memory.total - limit_bytes) / memory.temporaries
    microbatches = step.program.parallel.num_microbatches
    fewer = int(microbatches * share)
    if fewer > 0:
        return f"by proportion, batch_size={batch_size // microbatches * fewer} would fit"
    length = int(seq_len * share) // mesh.shape[TENSOR] * mesh.shape[TENSOR]
    if length > 0:
        return f"by proportion, seq_len={length} would fit"
    devices = math.ceil(mesh.size * memory.total / limit_bytes)
    return f"by proportion, {devices} devices instead of {mesh.size} would fit"


def _needs(memory: MemoryUse | None) -> str:
    return "more than the compiler has" if memory is None else _mib(memory.total)


def _limit(limit_bytes: int) -> str:
    return _mib(limit_bytes) if limit_bytes else "the compiler's"


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"
