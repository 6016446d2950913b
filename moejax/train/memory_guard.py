"""Holds a compiled step's memory against the device's; takes a smaller layout (`Layout.smaller`) if it does not fit.

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
from typing import Any

import jax
from absl import logging

from moejax.layout import DoesNotFitError, Layout
from moejax.train.step import TrainStep


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


def fit(step: TrainStep, limit_bytes: int, *, refused: bool = False) -> FittedStep:
    """Compiles `step`, or the first with a smaller layout that needs at most `limit_bytes` (0: no limit) on a device.

    `refused` says that `step` itself is known not to. The compiler's own refusal for want of memory (TPUs) counts as
    not fitting; any other error is raised.

    Raises:
        DoesNotFitError: naming the largest category and what would fit, if the last rung does not.
    """
    memory: MemoryUse | None = None
    program = step.program
    layouts = program.layout.smaller(program.model)
    for layout in layouts if refused else itertools.chain((program.layout,), layouts):
        if layout != step.program.layout:
            _log_step_down(step.program.resolved, layout, memory, limit_bytes)
            step = step.with_layout(**vars(layout))
        try:
            compiled = step.lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            memory = None
            continue
        memory = MemoryUse.of(compiled)
        if not limit_bytes or memory.total <= limit_bytes:
            return FittedStep(compiled, step, memory)
    raise DoesNotFitError(_refusal(step.program.resolved, memory, limit_bytes))


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether XLA's status is that memory ran out."""
    return str(error).startswith("RESOURCE_EXHAUSTED")


def _describe(layout: Layout) -> str:
    fields = ("num_microbatches", "grad_accumulation_steps", "remat")
    return " ".join(f"{name}={getattr(layout, name)}" for name in fields)


def _log_step_down(layout: Layout, smaller: Layout, memory: MemoryUse | None, limit_bytes: int) -> None:
    logging.warning(
        "Memory guard, %d tokens: %s needs %s, limit %s; stepping down to %s",
        layout.seq_len, _describe(layout), _needs(memory), _limit(limit_bytes), _describe(smaller.resolve()),
    )  # fmt: skip


def _refusal(layout: Layout, memory: MemoryUse | None, limit_bytes: int) -> str:
    """One line: what the smallest layout needs, of which most for what, and the smallest change that would fit."""
    needs = f"a step of {layout.batch_size} sequences of {layout.seq_len} tokens needs {_needs(memory)} a device"
    at = f"with {_describe(layout)}, where the ladder ends"
    if memory is None:
        return f"{needs} {at}; use a smaller batch, shorter sequences or more devices"
    change = _smallest_change(layout, memory, limit_bytes)
    return f"{needs} {at}, and the limit is {_limit(limit_bytes)}; the most is {memory.largest}; {change}"


def _smallest_change(layout: Layout, memory: MemoryUse, limit_bytes: int) -> str:
    """What to change, by proportion: temporaries go with the tokens, everything with the number of devices."""
    share = 1 - (memory.total - limit_bytes) / memory.temporaries
    fewer = int(layout.num_microbatches * share)
    if fewer > 0:
        return f"by proportion, batch_size={layout.batch_size // layout.num_microbatches * fewer} would fit"
    tensor = layout.mesh.tensor
    length = int(layout.seq_len * share) // tensor * tensor
    if length > 0:
        return f"by proportion, seq_len={length} would fit"
    have = layout.mesh.num_devices
    return f"by proportion, {math.ceil(have * memory.total / limit_bytes)} devices instead of {have} would fit"


def _needs(memory: MemoryUse | None) -> str:
    return "more than the compiler has" if memory is None else _mib(memory.total)


def _limit(limit_bytes: int) -> str:
    return _mib(limit_bytes) if limit_bytes else "the compiler's"


def _mib(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB"
