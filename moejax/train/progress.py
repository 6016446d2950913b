"""Says how far a run is: one live line on a terminal, and lines paced by time in a log."""

from __future__ import annotations

import collections
import contextlib
import datetime
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax
from rich.console import Console
from rich.live import Live
from rich.text import Text

STEP_SECONDS = 10  # between the lines of two steps in a log
SILENT_SECONDS = 15  # after which a log gets a line that says what is awaited
PACE_STEPS = 30  # over which the time left is reckoned
FRAMES_A_SECOND = 4
BAR_COLUMNS = 24


class Progress:
    """Shows on standard error what a run is doing; use it as a context manager, as often as needed.

    A terminal has one live line: a spinner, the step, the metrics, the elapsed time and the time left. Without a
    terminal there are lines: one when a new kind of waiting begins, one for the first and the last step, for each
    evaluation and for a step every `STEP_SECONDS`, and one whenever nothing was printed for `SILENT_SECONDS`.

    Args:
        steps: of the whole run.
        console: where to print. The default prints nothing in all processes but the first.
        clock: gives seconds.
    """

    def __init__(self, steps: int, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or make_console(quiet=jax.process_index() > 0)
        self._steps, self._clock = steps, clock
        self._waits: list[tuple[str, float]] = []  # what is awaited and since when, the innermost last
        self._said: set[str] = set()
        self._figures: list[str] = []
        self._printed = self._step_end = clock()
        self._exit = contextlib.ExitStack()
        self.begin(0)

    def __enter__(self) -> Progress:
        if self._console.is_interactive:
            live = Live(
                get_renderable=self._live_line,
                console=self._console,
                refresh_per_second=FRAMES_A_SECOND,
                transient=True,
            )
            self._exit.enter_context(live)
        else:
            over = threading.Event()
            thread = threading.Thread(target=self._beat_until, args=(over,), name="heartbeat", daemon=True)
            thread.start()
            self._exit.callback(thread.join)
            self._exit.callback(over.set)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    def begin(self, first: int) -> None:
        """Starts counting after step `first`. `done` is the number of the last step that has ended."""
        self.done = self._first = first
        self._ends: collections.deque[float] = collections.deque(maxlen=PACE_STEPS)  # of the last steps
        self._start = self._clock()

    @property
    def trained(self) -> bool:
        """Whether a step has ended since `begin`."""
        return self.done > self._first

    @property
    def awaited(self) -> str:
        """What is being done now, such as "compiling the train step"."""
        return next((what for what, _ in self._waits[-1:]), "this step")

    @contextlib.contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Shows `what` is being done, and for how long; a log gets a line when `what` is new."""
        self._waits.append((what, self._clock()))
        if not self._console.is_interactive and what not in self._said:
            self.say(what)
        self._said.add(what)
        try:
            yield
        finally:
            self._waits.pop()

    def update(self, what: str) -> None:
        """Shows `what` in place of what the innermost `waiting` shows; a log gets no line of its own for it."""
        self._waits[-1] = (what, self._waits[-1][1])

    def say(self, text: str) -> None:
        """Prints a line, above the live one if there is one."""
        self._printed = self._clock()
        self._console.print(text)

    def step(self, step: int, line: Mapping[str, float]) -> None:
        """Shows the metrics of a step that has ended."""
        now = self._clock()
        first = not self._ends
        self.done, self._step_end, self._figures = step, now, describe(line)
        self._ends.append(now)
        paced = first or step == self._steps or now - self._printed >= STEP_SECONDS
        head = f"step {step}/{self._steps}"
        if self._console.is_interactive:
            if "eval_loss" in line:
                self.say(fit(self._console.width, head, self._figures, self._left()))
        elif paced or "eval_loss" in line:
            self.say("  ".join(filter(None, (head, *self._figures, self._left()))))

    def beat(self) -> float:
        """Prints what is awaited if nothing was printed for `SILENT_SECONDS`; returns the seconds to the next such."""
        now = self._clock()
        if now - self._printed >= SILENT_SECONDS:
            what, since = (self._waits[-1:] or [(f"step {min(self.done + 1, self._steps)}", self._step_end)])[0]
            self.say(f"{what}, {now - since:.0f} s")
        return SILENT_SECONDS - (now - self._printed)

    def _beat_until(self, over: threading.Event) -> None:
        while not over.wait(self.beat()):
            pass

    def _left(self) -> str:
        """Returns the time to the last step at the pace of the last few; "" where there is none to tell."""
        ends = list(self._ends)
        if len(ends) < 2 or self.done >= self._steps:
            return ""
        return f"{_hours((ends[-1] - ends[0]) / (len(ends) - 1) * (self._steps - self.done))} left"

    def _live_line(self) -> Text:
        now, plain = self._clock(), self._console.options.ascii_only
        frames = "|/-\\" if plain else "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
        head = [frames[int(now * FRAMES_A_SECOND) % len(frames)]]
        if self._figures:
            head.append(f"{self.done}/{self._steps}")
        figures, times = self._figures or ["first step"], _hours(now - self._start)
        for what, since in self._waits[-1:]:  # a copy: this runs in a thread of its own
            figures, times = [what], _hours(now - since)
        done = self.done / self._steps if self._figures else None
        tail = "  ".join(filter(None, (times, self._left())))
        line = fit(self._console.width, " ".join(head), figures, tail, done, "#-" if plain else "━─")
        return Text(line, no_wrap=True, overflow="crop")


def fit(width: int, head: str, figures: Sequence[str], tail: str, done: float | None = None, bar: str = "━─") -> str:
    """Returns a line of less than `width` columns that has all of `head` and `tail`.

    The bar, of two kinds of characters, is there if all figures fit beside it. Figures are left out from the last; the
    first is cut if need be. `done` is the part of the bar that is filled; None is no bar.
    """
    room = width - 1 - len(head) - len(tail) - 4
    shown = list(figures)
    while len(shown) > 1 and len("  ".join(shown)) > room:
        shown.pop()
    text = "  ".join(shown)[: max(room, 0)]
    columns = min(BAR_COLUMNS, room - len(text) - 2)
    if done is not None and len(shown) == len(figures) and columns >= BAR_COLUMNS // 2:
        filled = round(done * columns)
        head += f" {bar[0] * filled}{bar[1] * (columns - filled)}"
    return "  ".join(part for part in (head, text, tail) if part)


def describe(line: Mapping[str, float]) -> list[str]:
    """Returns a step's metrics in words, in the order of importance: a narrow terminal leaves out the last.

    CV and rounds are over the balancer's window. Memory is of one device: the most in use so far, as its runtime says,
    or else the size that the step was compiled to.
    """
    figures = [f"loss {line['loss']:.3f}"]
    if "eval_bits_per_byte" in line:
        figures.append(f"held out {line['eval_bits_per_byte']:.2f} bits/byte")
    figures += [f"{line['tokens_per_second']:,.0f} tokens/s", f"CV {line['window_load_cv']:.3f}"]
    if line["window_dropped_fraction"] > 0:
        figures.append(f"dropped {line['window_dropped_fraction']:.2%}")
    return [
        *figures,
        f"rounds {line['window_rounds']:.2f}",
        _bytes(line["device_memory_bytes"]),
        f"{line['bits_per_byte']:.2f} bits/byte",
    ]


def make_console(**options: Any) -> Console:
    """Returns the console for people, on standard error: it prints text as it is, and leaves wrapping to the reader."""
    return Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False, **options)


def show_logs() -> None:
    """Has a script print log records for people, above the live line: notes as they are, the rest after `warning: `.

    Notes are records of level INFO of moejax's own loggers.
    """
    handler = _StderrHandler()
    handler.setFormatter(_Formatter())
    root = logging.getLogger()
    # Imported libraries have installed a plain one.
    root.handlers = [h for h in root.handlers if type(h) not in (logging.StreamHandler, _StderrHandler)] + [handler]
    logging.getLogger("moejax").setLevel(logging.INFO)


class _StderrHandler(logging.StreamHandler[TextIO]):
    """Writes to what `sys.stderr` is at the time: while a live line is shown, the line's keeper."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        level = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        return level + super().format(record)


def _bytes(number: float) -> str:
    return f"{number / 2**20:.0f} MiB" if number < 2**30 else f"{number / 2**30:.1f} GiB"


def _hours(seconds: float) -> str:
    return str(datetime.timedelta(seconds=int(seconds)))
