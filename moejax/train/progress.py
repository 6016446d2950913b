"""A run's progress: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

LINES_A_RUN = 20  # printed where there is no terminal


class Progress:
    """Shows the steps of a run on standard error; use it as a context manager.

    Args:
        steps: of the whole run.
        first: steps done before.
    """

    def __init__(self, steps: int, first: int) -> None:
        self._console = Console(stderr=True, quiet=jax.process_index() > 0)
        self._steps = steps
        self._bar = RichProgress(
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("", total=steps, completed=first)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def message(self, text: str) -> None:
        """Says what is being waited for."""
        self._bar.update(self._task, description=text)
        if not self._console.is_terminal:
            self._console.print(text, highlight=False)

    def step(self, step: int, line: Mapping[str, float]) -> None:
        """Shows a step's line of metrics."""
        text = (
            f"loss {line['loss']:.3f}  {line['bits_per_byte']:.2f} bits/byte  {line['tokens_per_second']:,.0f} tokens/s"
            f"  load CV {line['window_load_cv']:.3f}  rounds {line['window_rounds']:.2f}"
            f"  dropped {line['window_dropped_fraction']:.2%}"
        )
        if "eval_bits_per_byte" in line:
            text += f"  held out {line['eval_bits_per_byte']:.2f} bits/byte"
        self._bar.update(self._task, completed=step, description=text)
        every = max(1, self._steps // LINES_A_RUN)
        if not self._console.is_terminal and (step % every == 0 or step == self._steps or "eval_loss" in line):
            self._console.print(f"step {step}/{self._steps}  {text}", highlight=False, soft_wrap=True)
