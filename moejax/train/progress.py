"""A run's progress: a live bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column

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
            TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
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
        text = summarise(line)
        self._bar.update(self._task, completed=step, description=text)
        every = max(1, self._steps // LINES_A_RUN)
        if not self._console.is_terminal and (step % every == 0 or step == self._steps or "eval_loss" in line):
            self._console.print(f"step {step}/{self._steps}  {text}", highlight=False, soft_wrap=True)


def summarise(line: Mapping[str, float]) -> str:
    """A step's line of metrics in words, what matters most first, for a narrow terminal cuts off the end.

    CV and rounds are over the balancer's window, memory is of one device: the most in use so far, as its runtime says,
    or where it does not, what the compiled step takes.
    """
    text = (
        f"loss {line['loss']:.3f}  {line['tokens_per_second']:,.0f} tokens/s  CV {line['window_load_cv']:.3f}"
        f"  rounds {line['window_rounds']:.2f}  {_bytes(line['device_memory_bytes'])}"
        f"  {line['bits_per_byte']:.2f} bits/byte"
    )
    if line["window_dropped_fraction"] > 0:
        text += f"  dropped {line['window_dropped_fraction']:.2%}"
    if "eval_bits_per_byte" in line:
        text += f"  held out {line['eval_bits_per_byte']:.2f}"
    return text


def _bytes(number: float) -> str:
    return f"{number / 2**20:.0f} MiB" if number < 2**30 else f"{number / 2**30:.1f} GiB"
