"""Signals that stop a run: at once, or inside the training loop after the current step."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


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

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferred:
            raise Interrupted(number)
        self.received = number

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Record signals instead of raising; `raise_if` raises."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if(self, number: int) -> None:
        """Raise Interrupted for a signal that this or another rank received; 0 is none."""
        if number:
            raise Interrupted(number)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGUSR1 by one StopRequest; then restore the old handlers."""
    request = StopRequest()
    old = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
