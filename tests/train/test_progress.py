"""What a run says while it runs: one line that fits any terminal, and a log that is never silent for long."""

import contextlib
import datetime
import io
import itertools
import logging
import sys
import threading

import pytest

from moejax.train.progress import (
    SILENT_SECONDS,
    STEP_SECONDS,
    Progress,
    describe,
    fit,
    make_console,
    show_logs,
)

LINE = {
    "loss": 2.34567,
    "tokens_per_second": 123_456.7,
    "window_load_cv": 0.1234,
    "window_rounds": 1.25,
    "device_memory_bytes": 3 * 2**29,
    "bits_per_byte": 1.5,
    "window_dropped_fraction": 0.0,
}
EVALUATED = LINE | {"eval_loss": 1.0, "eval_bits_per_byte": 1.75}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Run:
    """A `Progress` of 100 steps on a clock of its own, and what it printed."""

    def __init__(self, width=80, terminal=False):
        self.written, self.clock = io.StringIO(), Clock()
        console = make_console(file=self.written, width=width, force_terminal=terminal)
        self.progress = Progress(100, console, self.clock)

    def lines(self):
        """The lines since the last call."""
        text = self.written.getvalue()
        self.written.seek(0)
        self.written.truncate()
        return text.splitlines()


def test_a_line_has_the_figures_in_words():
    assert "  ".join(describe(LINE)) == "loss 2.346  123,457 tokens/s  CV 0.123  rounds 1.25  1.5 GiB  1.50 bits/byte"
    more = describe(EVALUATED | {"device_memory_bytes": 5 * 2**20, "window_dropped_fraction": 0.031})
    assert more[:2] == ["loss 2.346", "held out 1.75 bits/byte"]
    assert {"dropped 3.10%", "5 MiB"} < set(more)


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
@pytest.mark.parametrize("waits", [False, True])
def test_steps_and_times_fit_any_terminal(width, waits):
    run = Run(width, terminal=True)
    run.clock.now += 3588
    run.progress.step(49, LINE)
    run.clock.now += 73.5
    run.progress.step(50, LINE)
    with run.progress.waiting("evaluating on held-out text") if waits else contextlib.nullcontext():
        run.clock.now += 9
        line = run.progress._live_line().plain
    assert len(line) < width
    assert " 50/100 " in line
    assert line.endswith("0:00:09  1:01:15 left" if waits else "1:01:10  1:01:15 left")
    assert ("evaluating on held-out text" if waits else "loss 2.346")[: width - 34] in line
    assert ("━" in line) == (width >= (80 if waits else 140)), "the bar is the first to go"
    shown = [figure in line for figure in describe(LINE)]
    assert waits or shown == sorted(shown, reverse=True), "then the last figures, whole"
    assert waits or all(shown) == (width >= 140)


def test_a_line_of_a_terminal_is_cut_in_order():
    figures = ["loss 2.346", "held out 1.75", "9 tokens/s"]
    everything = "  ".join(figures)
    assert fit(80, "50/100", figures, "0:10", 0.5) == f"50/100 {'━' * 12}{'─' * 12}  {everything}  0:10"
    assert fit(70, "50/100", figures, "0:10", 0.25) == f"50/100 {'━' * 4}{'─' * 12}  {everything}  0:10"
    assert fit(60, "50/100", figures, "0:10", 0.5) == f"50/100  {everything}  0:10"
    assert fit(50, "50/100", figures, "0:10", 0.5) == "50/100  loss 2.346  held out 1.75  0:10"
    assert fit(20, "50/100", figures, "0:10", 0.5) == "50/100  loss   0:10"
    assert fit(14, "50/100", figures, "0:10", 0.5) == "50/100  0:10"


def test_the_live_line_is_drawn_and_wiped_and_evaluations_stay():
    run = Run(terminal=True)
    with run.progress as progress:
        progress.step(1, LINE)
        progress.step(2, EVALUATED)  # a line of its own, cut to the terminal's width
    text = run.written.getvalue()
    assert "step 2/100  loss 2.346  held out 1.75 bits/byte  123,457 tokens/s  0:00:00 left\n" in text
    assert "step 1/100" not in text
    assert text.endswith("\x1b[2K"), "wiped"
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") == 1, "the cursor is back"


def test_a_log_gets_step_lines_paced_by_time():
    run = Run()
    said = []
    for step in range(1, 101):
        run.clock.now += 1
        run.progress.step(step, EVALUATED if step == 35 else LINE)
        said += [(step, line) for line in run.lines()]
    steps = [step for step, _ in said]
    assert steps[0] == 1
    assert steps[-1] == 100
    assert 35 in steps
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert max(gaps) == STEP_SECONDS
    assert len(steps) == 1 + 3 + 1 + 6 + 1, "1, 11, 21, 31, 35, 45, ..., 95, 100"
    assert all(line.startswith(f"step {step}/100  loss 2.346") for step, line in said)
    assert said[1][1].endswith("  0:01:29 left")
    assert not said[-1][1].endswith("left")


def test_a_pause_counts_in_the_time_left_for_a_while():
    run = Run()
    for step in range(1, 60):
        run.clock.now += 500 if step == 10 else 1
        run.progress.step(step, LINE)
        if step == 10:
            assert run.lines()[-1].endswith(f"  {datetime.timedelta(seconds=int((8 + 500) / 9 * 90))} left")
    run.clock.now += STEP_SECONDS
    run.progress.step(60, EVALUATED)
    assert run.lines()[-1].endswith(f"  {datetime.timedelta(seconds=int((28 + STEP_SECONDS) / 29 * 40))} left")


def test_slow_steps_each_get_a_line_and_fast_ones_do_not():
    run = Run()
    for step in range(1, 5):
        run.clock.now += STEP_SECONDS
        run.progress.step(step, LINE)
    assert len(run.lines()) == 4
    for step in range(5, 50):
        run.clock.now += 0.1
        run.progress.step(step, LINE)
    assert run.lines() == []


def test_a_log_says_what_is_awaited_at_once_and_then_now_and_then():
    run = Run()
    with run.progress.waiting("compiling the train step"):
        assert run.lines() == ["compiling the train step"]
        assert run.progress.awaited == "compiling the train step"
        said = []
        for _ in range(40):
            run.clock.now += 1
            left = run.progress.beat()
            assert 0 < left <= SILENT_SECONDS
            said += run.lines()
    assert said == ["compiling the train step, 15 s", "compiling the train step, 30 s"]
    assert run.progress.awaited == "this step"
    with run.progress.waiting("compiling the train step"):
        assert run.lines() == [], "said before"


def test_a_long_step_is_not_silent_either():
    run = Run()
    run.progress.step(1, LINE)
    run.clock.now += SILENT_SECONDS - 1
    assert run.progress.beat() == 1
    run.lines()
    run.clock.now += 1
    run.progress.beat()
    assert run.lines() == ["step 2, 15 s"]


def test_the_heartbeat_beats_while_the_main_thread_is_elsewhere():
    run = Run()
    beats = threading.Semaphore(0)
    beat = run.progress.beat

    def counted():
        beats.release()
        beat()
        return 0.001

    run.progress.beat = counted
    with run.progress:
        assert beats.acquire(timeout=60)
        assert beats.acquire(timeout=60)
    assert not any(thread.name == "heartbeat" for thread in threading.enumerate())


def test_a_log_never_wraps_nor_eats_brackets():
    run = Run(width=80)
    path = "/a/very/long/path/" * 8 + "[bold]/:smile:"
    run.progress.say(path)
    run.progress.step(1, EVALUATED)
    first, second = run.lines()
    assert first == path
    assert second.endswith("1.50 bits/byte")


@pytest.fixture
def shown_logs(monkeypatch):
    """`show_logs` until the end of the test."""
    root, library = logging.getLogger(), logging.getLogger("moejax")
    monkeypatch.setattr(root, "handlers", [*root.handlers, logging.StreamHandler()])
    show_logs()
    yield
    library.setLevel(logging.NOTSET)


def test_log_records_are_printed_for_people(shown_logs, monkeypatch, capsys):
    logging.getLogger("moejax.profiling.capture").info("traced %s", "runs/x")
    logging.getLogger("moejax.train.loop").warning("step 9, layer 1: too much")
    logging.getLogger("absl").warning("from another library")
    logging.getLogger("absl").info("not for people")
    assert capsys.readouterr().err.splitlines() == [
        "traced runs/x",
        "warning: step 9, layer 1: too much",
        "warning: from another library",
    ]
    live = io.StringIO()
    monkeypatch.setattr(sys, "stderr", live)  # as a live line does
    logging.getLogger("moejax").info("above the line")
    assert live.getvalue() == "above the line\n"
