"""Ctrl-C and SIGTERM: an answer at once, whatever the main thread is doing, and an end that says what it loses."""

import os
import signal
import sys
import threading

import pytest

from experiments.shared import loading
from moejax.train import signals
from moejax.train.signals import Signals


class Asked:
    """`Signals` with what it said, and how it would have ended the process."""

    def __init__(self, monkeypatch, capfd, awaited):
        self.said, self.answered, self.capfd = [], threading.Semaphore(0), capfd
        self.ended = []
        monkeypatch.setattr(signals.os, "_exit", self._end)
        self.signals = Signals(self._say, lambda: awaited, lambda: "steps after checkpoint 100 are not saved")

    def _say(self, line):
        self.said.append(line)
        self.answered.release()

    def _end(self, status):
        self.ended.append((status, self.capfd.readouterr().err))
        self.answered.release()

    def send(self, number):
        """Returns once the signal is answered."""
        os.kill(os.getpid(), number)
        assert self.answered.acquire(timeout=60)


@pytest.fixture
def ask(monkeypatch, capfd):
    return lambda awaited: Asked(monkeypatch, capfd, awaited)


@pytest.mark.parametrize(("number", "again"), [(signal.SIGINT, " again"), (signal.SIGTERM, "")])
def test_the_first_signal_is_acknowledged_and_the_second_ends(ask, number, again):
    asked = ask("this step and saving")
    with asked.signals as taken:
        assert not taken.stop
        asked.send(number)
        assert taken.stop
        assert asked.said == [f"stopping after this step and saving; Ctrl-C{again} to stop at once"]
        assert asked.ended == []
        asked.send(signal.SIGINT)
    assert asked.ended == [(130, "stopped at once; steps after checkpoint 100 are not saved\n")]
    assert len(asked.said) == 1


def test_more_of_sigterm_is_no_hurry(ask):
    asked = ask("this step")
    with asked.signals as taken:
        asked.send(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert taken.stop
    assert len(asked.said) == 1
    assert asked.ended == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_where_nothing_is_to_be_saved_the_first_signal_ends(ask, number):
    asked = ask(None)
    with asked.signals:
        asked.send(number)
    assert [status for status, _ in asked.ended] == [128 + number]
    assert asked.said == []


def test_the_answer_does_not_wait_for_the_main_thread(ask, monkeypatch):
    """While compiled code runs, Python calls no handler."""
    monkeypatch.setattr(Signals, "_handle", lambda *_: None)
    asked = ask("this step")
    with asked.signals as taken:
        asked.send(signal.SIGINT)
        assert not taken.stop
    assert len(asked.said) == 1


def test_handlers_are_given_back(ask):
    before = {number: signal.getsignal(number) for number in signals.TAKEN}
    fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(fd)
    with ask("x").signals:
        assert signal.getsignal(signal.SIGINT) not in before.values()
        with ask("y").signals:
            pass
        assert signal.getsignal(signal.SIGINT) not in before.values()
    assert {number: signal.getsignal(number) for number in signals.TAKEN} == before
    assert signal.set_wakeup_fd(fd) == fd
    assert not any(thread.name == "signals" for thread in threading.enumerate())


def test_another_thread_takes_none():
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter():
        with Signals(print) as taken:
            seen.extend([signal.getsignal(signal.SIGINT), taken.stop])

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [before, False]


def test_an_interactive_session_is_interrupted_and_lives(ask, monkeypatch):
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    asked = ask("this step")
    with asked.signals as taken:
        asked.send(signal.SIGINT)
        assert taken.stop
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert asked.ended == []
    asked = ask(None)
    with asked.signals, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert asked.ended == []


def test_ctrl_c_outside_of_a_run_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(loading, "show_logs", lambda: None)  # it is for the whole process
    # A process that was started in the background ignores Ctrl-C unless it says otherwise.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            loading.run(lambda _: signal.raise_signal(signal.SIGINT), loading.Flags(""))
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert capsys.readouterr().err == "stopped\n"
