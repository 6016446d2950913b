"""Cuts long texts into pieces, so that what a tokenizer needs per piece stays small."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator

PIECE = 2**16  # characters
_TRIES = 16  # at places of one kind
_LINE_END, _SPACE = re.compile(r"(?<=\S)\n(?=\S)"), re.compile(r"(?<=\S)(?= \S)")
_SECONDS_BETWEEN_REPORTS = 2.0

Report = Callable[[str], object]


def cut(text: str, fits: Callable[[int], bool] = lambda _: True) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of pieces of at most `PIECE` characters that make up `text`.

    A piece ends after the end of a line, else before a space, in its second half, at a place that `fits`. Tokenizers
    split text into words at these places anyway, so the ids are those of the whole text. If there is no such place, the
    piece is full, or nearly so where that fits better, and the ids next to its end may differ from those of the whole.
    """
    start = 0
    while len(text) - start > PIECE:
        full = start + PIECE
        end = next(filter(fits, _places(text, start + PIECE // 2, full)), full)
        yield start, end
        start = end
    yield start, len(text)


def _places(text: str, low: int, high: int) -> Iterator[int]:
    """Yields places after `low` and up to `high` to cut at, the best first."""
    window = text[low : high + 1]
    for pattern in (_LINE_END, _SPACE):
        places = [low + match.end() for match in pattern.finditer(window)]
        yield from places[: -_TRIES - 1 : -1]
    yield from range(high, max(low, high - _TRIES), -1)


class Reporter:
    """Reports how much of a long task is done, every few seconds."""

    def __init__(self, report: Report | None, task: str, total: int) -> None:
        self._report, self._task, self._total = report, task, total
        self._done, self._last = 0, time.monotonic()

    def add(self, amount: int) -> None:
        """Counts `amount` of the total as done."""
        self._done += amount
        now = time.monotonic()
        if self._report is not None and now - self._last >= _SECONDS_BETWEEN_REPORTS:
            self._report(f"{self._task} {self._done / self._total:.0%}")
            self._last = now
