"""One plan on one cluster: its memory and its time, as the planner predicts them."""

from __future__ import annotations

import dataclasses

from moejax import sharding
from moejax.config import ConfigError
from moejax.pipeline import num_ticks
from moejax.planner.costs import Assumptions
from moejax.planner.flops import decode_flops, forward_flops
from moejax.planner.hardware import Cluster
from moejax.planner.memory import Memory, predict_memory
from moejax.planner.plan import Plan
from moejax.planner.program import work
from moejax.planner.serve import decode_work
from moejax.planner.time import Placement, Step, StepTime, predict_time
from moejax.planner.units import quantity
from moejax.train.memory_guard import DoesNotFitError

EXPECTED_LOAD = 1.1  # busiest over mean, of a balanced router over a microbatch: CV 0.05 and a sampling floor of 0.04


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A plan with what it takes, of one device, and how long."""

    plan: Plan
    memory: Memory
    time: StepTime

    @property
    def tokens_per_ms(self) -> float:
        return self.plan.tokens / self.time.expected / 1e3

    def fits(self, limit_bytes: float) -> bool:
        return self.memory.peak_bytes <= limit_bytes


def check(plan: Plan) -> None:
    """Raises `ConfigError` where the plan's program cannot be built."""
    if plan.mode == "decode":  # no sequences to cut and no microbatches
        sharding.check_layout(plan.model, plan.dispatch, plan.parallel, plan.mesh)
    else:
        sharding.check_layout(
            plan.model, plan.dispatch, plan.parallel, plan.mesh,
            batch_size=plan.batch_size, seq_len=plan.seq_len, accumulate=plan.accumulate,
        )  # fmt: skip


def is_legal(plan: Plan) -> bool:
    """Whether the plan's program can be built."""
    try:
        check(plan)
    except ConfigError:
        return False
    return True


def model_flops(plan: Plan) -> float:
    """FLOPs of the model's mathematics in one step, over all devices (see `moejax.planner.flops`)."""
    if plan.mode == "decode":
        return plan.batch_size * decode_flops(plan.model, plan.seq_len)
    passes = 3 if plan.mode == "train" else 1
    return passes * plan.tokens * forward_flops(plan.model, plan.seq_len)


def step_of(plan: Plan) -> Step:
    """What the time model asks of a step beside its work."""
    ragged = plan.dispatch.strategy == "ragged"
    load = EXPECTED_LOAD if ragged else 1.0  # buffers are computed whole, whatever is in them
    ticks = num_ticks(plan.parallel.num_microbatches, plan.mesh.pipeline, plan.parallel.repeats)
    bubble = 0.0 if plan.mode == "decode" else (plan.mesh.pipeline - 1) / ticks
    mesh = plan.mesh
    overlaps = mesh.expert * mesh.tensor > 1 and mesh.hardware != "cpu"
    sequences = plan.batch_size // (mesh.replica * mesh.expert * plan.parallel.num_microbatches * plan.accumulate)
    split = 1 if plan.mode == "decode" else plan.parallel.parts(sequences, overlaps=overlaps)
    return Step(
        tokens=plan.tokens, model_flops=model_flops(plan), bubble=bubble, parts=split * plan.dispatch.chunks, load=load
    )


def predict_step(plan: Plan, cluster: Cluster, assumptions: Assumptions) -> StepTime:
    """Time of one step of the plan."""
    items = decode_work(plan) if plan.mode == "decode" else work(plan)
    return predict_time(items, cluster, Placement.of(plan.mesh), step=step_of(plan), assumptions=assumptions)


def predict_plan(plan: Plan, cluster: Cluster, assumptions: Assumptions | None = None) -> Prediction:
    """Memory and time of a plan.

    Raises:
      ConfigError: its program cannot be built.
    """
    check(plan)
    return Prediction(plan, predict_memory(plan), predict_step(plan, cluster, assumptions or Assumptions()))


def check_fits(plan: Plan, limit_bytes: float) -> bool:
    """Whether a training plan fits as it is; if not, the trainer's ladder (`moejax.train.memory_guard`) makes it fit.

    Raises:
      DoesNotFitError: the ladder's last rung is predicted not to fit either; names what takes most, and what would fit.
    """
    memory = predict_memory(plan)
    if memory.peak_bytes <= limit_bytes:
        return True
    last = _last_rung(plan)
    least = predict_memory(last)
    if least.peak_bytes > limit_bytes:
        raise DoesNotFitError(
            f"{plan.batch_size:,} sequences of {plan.seq_len:,} tokens need {quantity(memory.peak_bytes, 'B')} per "
            f"device as configured, and {quantity(least.peak_bytes, 'B')} with full rematerialization and the smallest "
            f"microbatches, but a device has {quantity(limit_bytes, 'B')}; {most(least)}; they would fit with "
            f"{' or with '.join(smallest_changes(last, limit_bytes))}"
        )
    return False


def _last_rung(plan: Plan) -> Plan:
    """The plan with the strongest rematerialization and one sequence of a device at a time."""
    count = plan.batch_size // (plan.mesh.replica * plan.mesh.expert * plan.accumulate)
    parallel = dataclasses.replace(plan.parallel, remat="full", num_microbatches=count, batch_split=1)
    least = dataclasses.replace(plan, parallel=parallel)
    return least if is_legal(least) else plan


def most(memory: Memory) -> str:
    """Says which category takes the most memory, and how much."""
    return f"the largest part is {memory.largest.replace('_', ' ')}, {quantity(memory.categories[memory.largest], 'B')}"


def smallest_changes(plan: Plan, limit_bytes: float) -> list[str]:
    """Names what would fit: shorter sequences, if any would, or devices with more memory.

    A smaller batch does not help, because the batch was accumulated in parts already.
    """
    devices = f"{predict_memory(plan).peak_bytes / 1e9 + 1:.0f} GB of memory per device"
    seq_len = plan.seq_len
    while seq_len > 128:
        seq_len = max(128, seq_len // 2)
        shorter = dataclasses.replace(plan, seq_len=seq_len)
        if is_legal(shorter) and predict_memory(shorter).peak_bytes <= limit_bytes:
            return [f"seq_len={seq_len}", devices]
    return [devices]
