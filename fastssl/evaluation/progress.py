"""Progress of an evaluation: a line about what it is doing, at intervals."""

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

EVERY_S = 30.0


class Progress:
    """Logs `doing` every `every_s` seconds from a thread, so that one long fit is reported too; a
    context manager. What ends sooner logs nothing."""

    def __init__(self, log: Callable[[str], None], every_s: float | None = None):
        self.doing = "starting"
        self._log, self._every_s = log, EVERY_S if every_s is None else every_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._report, name="progress", daemon=True)
        self._begin = time.monotonic()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _report(self) -> None:
        while not self._ended.wait(self._every_s):
            self._log(f"evaluating, {time.monotonic() - self._begin:.0f} s: {self.doing}")
