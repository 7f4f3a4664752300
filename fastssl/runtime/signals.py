"""Signals that ask a run to stop: obeyed at once, but inside the training loop after the step at
hand."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Interrupted(BaseException):  # not an Exception: no handler of errors may swallow it
    """A signal asked the run to stop. `exit_code` is the shell's for it: 130, 143, 138."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = 128 + number


class StopRequest:
    """Says which signal has come, if any, while it holds signals back."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._held = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        if not self._held:
            raise Interrupted(number)
        self.received = number

    @contextmanager
    def held(self) -> Iterator[None]:
        """Note signals instead of obeying them; `obey` raises."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    def obey(self, number: int) -> None:
        """Raise Interrupted for a signal that this or another rank received; 0 is none."""
        if number:
            raise Interrupted(number)


@contextmanager
def stop_signals() -> Iterator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGUSR1 by one StopRequest; then bring the old handlers back."""
    request = StopRequest()
    old = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
