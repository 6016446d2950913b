"""The line of a step: everything that is promised, on one line in any terminal."""

import io

import pytest
from rich.console import Console

from moejax.train import progress
from moejax.train.progress import Progress, summarise

LINE = {
    "loss": 2.34567,
    "tokens_per_second": 123_456.7,
    "window_load_cv": 0.1234,
    "window_rounds": 1.25,
    "device_memory_bytes": 3 * 2**29,
    "bits_per_byte": 1.5,
    "window_dropped_fraction": 0.0,
}


def test_a_line_has_the_figures_in_words():
    assert summarise(LINE) == "loss 2.346  123,457 tokens/s  CV 0.123  rounds 1.25  1.5 GiB  1.50 bits/byte"
    more = LINE | {"device_memory_bytes": 5 * 2**20, "window_dropped_fraction": 0.031, "eval_bits_per_byte": 1.75}
    assert summarise(more).endswith("rounds 1.25  5 MiB  1.50 bits/byte  dropped 3.10%  held out 1.75")


@pytest.mark.parametrize("width", [60, 120, 200])
def test_the_bar_stays_on_one_line(width, monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(progress, "Console", lambda **_: Console(file=written, force_terminal=True, width=width))
    with Progress(100, 0) as bar:
        bar.step(7, LINE)
    last = written.getvalue().split("7/100")[-1]
    assert last.count("\n") <= 1, "only that which ends the bar"
    assert "loss 2" in last
    assert ("5 GiB" in last) == (width > 100)


def test_without_a_terminal_a_line_is_printed_now_and_then(capsys):
    with Progress(100, 0) as bar:
        for step in range(1, 101):
            bar.step(step, LINE)
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == progress.LINES_A_RUN
    assert printed[-1].startswith("step 100/100  loss 2.346")
