"""The log of a run: its lines on the screen and in log.txt, and a heartbeat while it is silent."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

EARLY = 1000  # lines that are kept until there is a file
QUIET_S = 30.0  # seconds of silence after which a heartbeat is logged


class RunLog:
    """`log(line)`: passes each line to `show` and appends it to the file of `write_to`, which also
    gets the lines before it. A context manager, which closes the file.

    While `doing` runs, from any thread, silence longer than `quiet_s` is ended by a line that says
    what is done and since when.
    """

    def __init__(self, show: Callable[[str], None], quiet_s: float = QUIET_S):
        self._show, self._quiet_s = show, quiet_s
        self._lock = threading.RLock()  # a signal handler may log too
        self._early: deque[str] = deque(maxlen=EARLY)
        self._file: TextIO | None = None
        self._last = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            if error is not None and self._file:
                self._write(f"ended by {kind.__name__ if kind else ''}: {error}")
            if self._file:
                self._file.close()
            self._file = None

    def __call__(self, line: str) -> None:
        self.line(line)

    def line(self, line: str, *, shown: bool = True) -> None:
        """Log one line, to the file alone unless `shown`."""
        with self._lock:
            self._last = time.monotonic()
            self._write(line)
            if shown:
                self._show(line)

    def write_to(self, path: Path) -> None:
        """Append all lines, those so far among them, to the file `path`."""
        with self._lock:
            self._file = open(path, "a", buffering=1, encoding="utf-8")
            self._file.write("".join(line + "\n" for line in self._early))
            self._early.clear()

    @contextmanager
    def doing(self, what: str | Callable[[], str]) -> Iterator[None]:
        """Log `what`, with the seconds so far, where the block is silent for long."""
        end, begin = threading.Event(), time.monotonic()

        def beat() -> None:
            while not end.wait(max(0.01, self._last + self._quiet_s - time.monotonic())):
                if time.monotonic() - self._last >= self._quiet_s:
                    text = what if isinstance(what, str) else what()
                    self(f"{text}, for {time.monotonic() - begin:.0f} s so far")

        thread = threading.Thread(target=beat, name="fastssl-heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.set()
            thread.join()

    def _write(self, line: str) -> None:
        if self._file:
            self._file.write(line + "\n")
        else:
            self._early.append(line)


def discard(line: str) -> None:
    """The log of every rank but rank 0."""
