"""Counts of a compiled step, to hold against those of its program: FLOPs, bytes that collectives send, peak memory.

    compiled = make_train_step(program).lower().compile()
    pairs = against_program(model, layout, compiled_counts(compiled, model, layout))

For `moe_16x10b` on 2×8 H100 FLOPs agree to 5e-5, the compiler having made the weighted sums of `combine` elementwise,
and every kind of collective to the byte or nearly, but for what the compiler does of itself:

- It gathers weights in 16 bits in the forward pass, see `CompiledCounts.written_bytes`.
- Two sums over devices that are added up it makes one where it can: of the gradients of norms and routers, of which
  there is one for each part of a microbatch (`layout.batch_split`). It is 0.04% of all bytes.
- With `grad_accumulation_steps=2` the scan over further slices has one turn, which it unrolls and merges with the first
  slice: embedding and output table are gathered, and their gradients scattered, once.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from moejax import hlo
from moejax.config import ModelConfig
from moejax.hlo import Instruction, Module
from moejax.kernels.attention import cost
from moejax.layout import Layout
from moejax.planner.passes import BYTES
from moejax.profiling.step_counts import count_step

_KINDS = {
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-reduce": "all_reduce",
    "collective-permute": "ppermute",
}


@dataclasses.dataclass(frozen=True)
class CompiledCounts:
    """What one device does in one run of a compiled step.

    Attributes:
      flops: of matrix products, custom calls of kernels included.
      sent_bytes: by kind, as `moejax.planner.work.Kind` names them.
      written_bytes: by kind, what would be sent had the compiler not narrowed anything. The program gathers weights in
        float32 and casts them where they are used; XLA for GPUs moves the cast in front of the gather where it can (in
        the forward pass's loop, not in the backward pass's, whose gathers it has taken apart from their uses), which
        halves these bytes. It is this figure that the trace has.
      asynchronous: by kind, the part of these bytes whose collectives start and end as instructions of their own.
      peak_bytes: of memory, the compiler's own figure.
    """

    flops: float
    sent_bytes: dict[str, float]
    written_bytes: dict[str, float]
    asynchronous: dict[str, float]
    peak_bytes: int


def compiled_counts(compiled: Any, model: ModelConfig, layout: Layout) -> CompiledCounts:
    """Counts a compiled train step, for GPUs or TPUs, trip counts of its loops multiplied.

    Raises:
      ValueError: the text of the program has a form that `moejax.hlo` cannot read.
    """
    module = hlo.parse(compiled.as_text(), kernel_flops(model, layout))
    sent, written, asynchronous = (defaultdict[str, float](float) for _ in range(3))
    for computation, instruction, times in executed(module):
        found = hlo.collective(module, computation, instruction)
        if found and found.sent_bytes:
            kind = _KINDS[found.kind]
            sent[kind] += times * found.sent_bytes
            narrowed = _gathers_weights(kind, instruction) and _bytes_of_float32(instruction) / instruction.num_bytes
            written[kind] += times * found.sent_bytes * (narrowed or 1)
            asynchronous[kind] += times * found.sent_bytes * found.asynchronous
    return CompiledCounts(
        flops=module.computation_flops(module.entry),
        sent_bytes=dict(sent),
        written_bytes=dict(written),
        asynchronous={kind: asynchronous[kind] / size for kind, size in sent.items()},
        peak_bytes=compiled.memory_analysis().peak_memory_in_bytes,
    )


def against_program(model: ModelConfig, layout: Layout, found: CompiledCounts) -> dict[str, tuple[float, float]]:
    """Returns pairs, of the program and compiled: "flops", then by kind the bytes sent (`written_bytes`)."""
    counts = count_step(model, layout)
    traced: dict[str, float] = defaultdict(float)
    for (_, kind, _), sent_bytes in counts.sent_bytes.items():
        traced[kind] += sent_bytes
    kinds = sorted(traced.keys() | found.written_bytes.keys())
    sent = {kind: (traced[kind], found.written_bytes.get(kind, 0.0)) for kind in kinds}
    return {"flops": (sum(counts.flops.values()), found.flops)} | sent


def _gathers_weights(kind: str, x: Instruction) -> bool:
    """Whether it is a gather in the phase `gather`, by the name that the program gave it."""
    name = re.search(r'op_name="([^"]*)"', x.attributes)
    return kind == "all_gather" and name is not None and re.search(r"\bgather\b[^/]*/all_gather", name[1]) is not None


def _bytes_of_float32(x: Instruction) -> float:
    return 4.0 * sum(map(math.prod, x.arrays))


def executed(module: Module) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that is run, with its computation and how often; those inside fusions are not listed."""

    def visit(computation: str, times: int) -> Iterator[tuple[str, Instruction, int]]:
        for x in module.computations[computation].values():
            yield computation, x, times
            if x.opcode in ("while", "conditional", "call"):
                inside = times * (module.trip_count(x) if x.opcode == "while" else 1)
                for name in x.called:
                    yield from visit(name, inside)

    yield from visit(module.entry, 1)


def kernel_flops(model: ModelConfig, layout: Layout) -> Callable[[Instruction], float]:
    """FLOPs of the custom calls of the kernels that the step has, by the rules of `moejax.planner.jaxpr`."""
    platform = "tpu" if layout.mesh.platform == "tpu" else "gpu"
    seq_len, _ = cost.padded(platform, layout.seq_len, model.attention.head_dim, BYTES[model.dtype])

    def flops(call: Instruction) -> float:
        shapes = _operand_shapes(call)
        if "top_k_routing" in call.attributes and len(shapes) > 1:
            return 2.0 * math.prod(shapes[0]) * model.num_experts
        if "grouped_matmul_" in call.attributes:
            left, right = (shape for shape in shapes if len(shape) > 1)
            return 2.0 * math.prod(left) * right[1] if len(right) == 2 else 2.0 * left[0] * math.prod(right[1:])
        return cost.custom_call_flops(call.attributes, seq_len)

    return flops


def _operand_shapes(call: Instruction) -> list[tuple[int, ...]]:
    found = re.search(r"operand_layout_constraints=\{(.*?\})\}", call.attributes)
    return [tuple(map(int, dims.split(","))) for dims in re.findall(r"\[([\d,]+)\]", found[1])] if found else []
