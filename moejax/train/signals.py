"""Ctrl-C and SIGTERM during a run: acknowledged at once, whatever the process is doing, and obeyed as soon as is safe.

Python calls a signal's handler between two of its instructions, so not while compiled code runs: a long step, a
compilation or a sample. The signal's number is written to a pipe immediately, though (`signal.set_wakeup_fd`), and a
thread that reads the pipe can answer.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

TAKEN = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """Takes SIGINT (Ctrl-C) and SIGTERM for as long as it is entered.

    After the first of them `stop` is true, and `say` gets a line about what will happen. Where there is nothing to
    save, the process ends right then. A later SIGINT ends it in any case, with a line about what is lost. Both exit
    with status 128 + the signal's number, as a shell reports a process that a signal killed. An interactive session
    gets a KeyboardInterrupt instead.

    Python allows handlers in its main thread only; entered in another, this does nothing.

    Args:
        say: prints a line.
        awaited: says what must end before the run can stop; None if there is nothing to save.
        lost: says what a stop without waiting loses.
    """

    def __init__(
        self,
        say: Callable[[str], None],
        awaited: Callable[[], str | None] = lambda: None,
        lost: Callable[[], str] = lambda: "nothing is lost",
    ) -> None:
        self._say, self._awaited, self._lost = say, awaited, lost
        self._interactive = hasattr(sys, "ps1")
        self._asked = False  # as the thread sees it
        self.stop = False  # as the main thread sees it

    def __enter__(self) -> Signals:
        self._taken = threading.current_thread() is threading.main_thread()
        if self._taken:
            self._read, self._write = socket.socketpair()
            self._write.setblocking(False)
            self._previous_fd = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
            self._previous: dict[int, Any] = {number: signal.signal(number, self._handle) for number in TAKEN}
            self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._taken:
            for number, handler in self._previous.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._previous_fd)
            self._write.send(b"\0")
            self._thread.join()
            self._read.close()
            self._write.close()

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._interactive and number == signal.SIGINT and (self.stop or self._awaited() is None):
            raise KeyboardInterrupt
        self.stop = True

    def _watch(self) -> None:
        while number := self._read.recv(1)[0]:
            if number in TAKEN:
                self._answer(number)

    def _answer(self, number: int) -> None:
        again, self._asked = self._asked, True
        awaited = self._awaited()
        if not again and awaited is not None:
            more = "again " if number == signal.SIGINT else ""
            self._say(f"stopping after {awaited}; Ctrl-C {more}to stop at once")
        elif not again or number == signal.SIGINT:
            self._end(number, f"stopped at once; {self._lost()}")

    def _end(self, number: int, line: str) -> None:
        if self._interactive:
            return
        # Past every lock and buffer, which the main thread may hold. The escapes clear a live line, show the cursor.
        clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
        os.write(2, f"{clear}{line}\n".encode())
        os._exit(128 + number)
