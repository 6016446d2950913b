"""What one step of a run came to, and the line of metrics.jsonl that says so."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from moejax.balance import BalanceReport


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """How well the model predicts the held-out text."""

    loss: float  # nats per target
    bits_per_byte: float  # of the text

    def line(self) -> dict[str, float]:
        return {"eval_loss": self.loss, "eval_bits_per_byte": self.bits_per_byte}


@dataclasses.dataclass(frozen=True)
class StepRecord:
    """One step, as it ran: with the buffers and the layout that it had after the memory guard."""

    step: int  # counted from 1
    scalars: dict[str, float]  # those among the train step's metrics
    report: BalanceReport  # of the window that ends here, NumPy arrays by layer
    bits_per_byte: float  # of the batch's text; NaN for a text without a byte
    seq_len: int
    num_tokens: int
    remat: str
    seconds: float
    reshard_seconds: float  # to move the state to this step's mesh
    device_memory_bytes: int
    evaluation: Evaluation | None = None  # after this step

    @property
    def next_capacity_index(self) -> int:
        """Which of the balancer's buffer sizes the next step is to have."""
        return int(self.scalars["next_capacity_index"])

    @property
    def is_finite(self) -> bool:
        """Whether the loss, the gradient and every router logit are."""
        s = self.scalars
        return math.isfinite(s["loss"]) and math.isfinite(s["grad_norm"]) and s["invalid_tokens"] == 0

    def line(self) -> dict[str, Any]:
        """Returns the step's line of metrics.jsonl, but for its number."""
        scalars = {name: value for name, value in self.scalars.items() if name != "next_capacity_index"}
        return {
            **scalars,
            "bits_per_byte": self.bits_per_byte,
            "load_cv_window_tokens": self.num_tokens,
            "step_seconds": self.seconds,
            "tokens_per_second": self.num_tokens / self.seconds,
            "bucket_seq_len": self.seq_len,
            "remat": self.remat,
            "reshard_seconds": self.reshard_seconds,
            "device_memory_bytes": self.device_memory_bytes,
            **(self.evaluation.line() if self.evaluation else {}),
        }


def bits_per_byte(nats: float, num_bytes: int) -> float:
    """Returns a loss over a text in bits per byte of it; NaN for a text without a byte, such as a batch of separators.

    Args:
        nats: summed over the text's tokens.
        num_bytes: of the text.
    """
    return nats / math.log(2) / num_bytes if num_bytes else math.nan
