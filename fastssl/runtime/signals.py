"""Signals that stop a run: at once, or inside the training loop after the current step.

A second Ctrl-C stops at once. Python calls signal handlers between two of its instructions, and a
step, a compilation or a collective is one: a thread therefore reads the signals too, announces
the first and ends the process for the second.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
ONE_PRESS_S = 0.2  # launchers pass Ctrl-C on to a process that has received it from the terminal
REACTION_S = 0.5  # within which the main thread raises, unless it is busy outside Python
SHOW_CURSOR = "\x1b[?25h"  # a progress bar hides it


class Interrupted(BaseException):  # not an Exception, so that no error handler catches it
    """A signal stopped the run. `exit_code` is the shell's for it: 130, 143, 138."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """The signal received while raising is deferred, if any."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._first_s = 0.0
        self._raised = threading.Event()

    def handle(self, number: int, frame: FrameType | None) -> None:
        now, repeated = time.monotonic(), self.received is not None
        if not self._deferred or (repeated and self._is_second(number, now - self._first_s)):
            self._raised.set()
            raise Interrupted(number)
        if not repeated:
            self._first_s = now
        self.received = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Record signals instead of raising, except for a second Ctrl-C; `raise_if` raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if(self, number: int) -> None:
        """Raise Interrupted for a signal that this or another rank received; 0 is none."""
        if number:
            self._raised.set()
            raise Interrupted(number)

    def watch(self, pipe: int) -> None:
        """Read signal numbers from `pipe` until it is closed: announce the first unless it has
        stopped the run, end the process for a second Ctrl-C unless the main thread does."""
        first_s: float | None = None
        while data := os.read(pipe, 1):
            number, now = data[0], time.monotonic()
            if number not in SIGNALS:
                continue
            if first_s is None:
                first_s = now
                if self._deferred:
                    _announce(number, "saving after the current step")
                elif not self._raised.wait(REACTION_S):
                    _announce(number, "stopping after the current operation")
            elif self._is_second(number, now - first_s) and not self._raised.wait(REACTION_S):
                print(SHOW_CURSOR if sys.stderr.isatty() else "", end="", file=sys.stderr)
                print("fastssl: stopped at once, without saving", file=sys.stderr, flush=True)
                os._exit(128 + number)

    @staticmethod
    def _is_second(number: int, after_s: float) -> bool:
        return number == signal.SIGINT and after_s > ONE_PRESS_S


def _announce(number: int, what: str) -> None:
    """Once for all ranks, which a launcher signals together."""
    if os.environ.get("RANK", "0") != "0":
        return
    name = signal.Signals(number).name
    print(
        f"fastssl: {name} received: {what}; press Ctrl-C to stop at once",
        file=sys.stderr,
        flush=True,
    )


@contextmanager
def stop_signals(log: Callable[[str], None] | None = None) -> Iterator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGUSR1 by one StopRequest; then restore the old handlers.

    Python has signals in the main thread alone: elsewhere none is handled, which `log` is told.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        if log:
            log("training outside the main thread: no signal saves or stops this run")
        yield request
        return
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    old = {number: signal.signal(number, request.handle) for number in SIGNALS}
    old_pipe = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    watcher = threading.Thread(target=request.watch, args=(read_end,), daemon=True)
    watcher.start()
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_pipe)
        os.close(write_end)
        watcher.join()
        os.close(read_end)
