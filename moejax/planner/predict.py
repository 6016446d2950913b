"""One layout on one cluster: its memory and its time, as the planner predicts them."""

from __future__ import annotations

import dataclasses

from moejax.checks import ConfigError
from moejax.config import ModelConfig
from moejax.layout import DoesNotFitError, Layout
from moejax.planner.costs import Assumptions
from moejax.planner.flops import decode_flops, forward_flops
from moejax.planner.hardware import Cluster
from moejax.planner.memory import Memory, predict_memory
from moejax.planner.program import work
from moejax.planner.serve import decode_work
from moejax.planner.time import AxisSpans, StepFacts, StepTime, predict_time
from moejax.planner.units import quantity
from moejax.planner.work import Mode

EXPECTED_LOAD = 1.1  # busiest over mean, of a balanced router over a microbatch: CV 0.05 and a sampling floor of 0.04


@dataclasses.dataclass(frozen=True)
class Prediction:
    """A layout with what it takes, of one device, and how long."""

    layout: Layout
    memory: Memory
    time: StepTime
    mode: Mode = "train"

    @property
    def tokens_per_ms(self) -> float:
        return step_tokens(self.layout, self.mode) / self.time.expected / 1e3

    def fits(self, limit_bytes: float) -> bool:
        return self.memory.peak_bytes <= limit_bytes


def step_tokens(layout: Layout, mode: Mode) -> int:
    """Returns the tokens of one step, over all devices."""
    return layout.batch_size if mode == "decode" else layout.tokens


def is_legal(model: ModelConfig, layout: Layout, mode: Mode = "train") -> bool:
    """Whether the program can be built."""
    try:
        layout.check(model, batch=mode != "decode")  # decoding has no sequences to cut and no microbatches
    except ConfigError:
        return False
    return True


def model_flops(model: ModelConfig, layout: Layout, mode: Mode) -> float:
    """FLOPs of the model's mathematics in one step, over all devices (see `moejax.planner.flops`)."""
    if mode == "decode":
        return layout.batch_size * decode_flops(model, layout.seq_len)
    passes = 3 if mode == "train" else 1
    return passes * layout.tokens * forward_flops(model, layout.seq_len)


def step_of(model: ModelConfig, layout: Layout, mode: Mode) -> StepFacts:
    """What the time model asks of a step beside its work."""
    ragged = layout.dispatch.strategy == "ragged"
    return StepFacts(
        tokens=step_tokens(layout, mode),
        model_flops=model_flops(model, layout, mode),
        bubble=0.0 if mode == "decode" else layout.idle_share(model),
        parts=(1 if mode == "decode" else layout.resolve().batch_split) * layout.dispatch.chunks,
        load=EXPECTED_LOAD if ragged else 1.0,  # buffers are computed whole, whatever is in them
    )


def predict_step(
    model: ModelConfig, layout: Layout, cluster: Cluster, assumptions: Assumptions, mode: Mode = "train"
) -> StepTime:
    """Time of one step."""
    items = decode_work(model, layout) if mode == "decode" else work(model, layout, mode)
    step = step_of(model, layout, mode)
    return predict_time(items, cluster, AxisSpans.of(layout.mesh), step=step, assumptions=assumptions)


def predict_layout(
    model: ModelConfig,
    layout: Layout,
    cluster: Cluster,
    assumptions: Assumptions | None = None,
    mode: Mode = "train",
) -> Prediction:
    """Memory and time of a step.

    Raises:
      ConfigError: its program cannot be built.
    """
    layout.check(model, batch=mode != "decode")
    time = predict_step(model, layout, cluster, assumptions or Assumptions(), mode)
    return Prediction(layout, predict_memory(model, layout, mode), time, mode)


def check_fits(model: ModelConfig, layout: Layout, limit_bytes: float) -> bool:
    """Whether a training step fits as it is; if not, a smaller layout (`Layout.smaller`) does.

    Raises:
      DoesNotFitError: the smallest is predicted not to fit either; names what takes most, and what would fit.
    """
    memory = predict_memory(model, layout)
    if memory.peak_bytes <= limit_bytes:
        return True
    *_, smallest = layout, *layout.smaller(model)
    least = predict_memory(model, smallest)
    if least.peak_bytes > limit_bytes:
        changes = " or with ".join(smallest_changes(model, smallest, limit_bytes))
        raise DoesNotFitError(
            f"{layout.batch_size:,} sequences of {layout.seq_len:,} tokens need {quantity(memory.peak_bytes, 'B')} per "
            f"device as configured, and {quantity(least.peak_bytes, 'B')} with full rematerialization and the smallest "
            f"microbatches, but a device has {quantity(limit_bytes, 'B')}; {most(least)}; they would fit with {changes}"
        )
    return False


def most(memory: Memory) -> str:
    """Says which category takes the most memory, and how much."""
    return f"the largest part is {memory.largest.replace('_', ' ')}, {quantity(memory.categories[memory.largest], 'B')}"


def smallest_changes(model: ModelConfig, layout: Layout, limit_bytes: float, mode: Mode = "train") -> list[str]:
    """Names what would fit: shorter sequences, if any would, or devices with more memory.

    A smaller batch does not help, because the batch was accumulated in parts already.
    """
    devices = f"{predict_memory(model, layout, mode).peak_bytes / 1e9 + 1:.0f} GB of memory per device"
    seq_len = layout.seq_len
    while seq_len > 128:
        seq_len = max(128, seq_len // 2)
        shorter = layout.replace(seq_len=seq_len)
        if is_legal(model, shorter, mode) and predict_memory(model, shorter, mode).peak_bytes <= limit_bytes:
            return [f"seq_len={seq_len}", devices]
    return [devices]
