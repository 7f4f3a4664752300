"""Watchdog: logs the phase and the stack of a step that takes twice its usual time."""

import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Self, TypeVar

Item = TypeVar("Item")
RECENT = 20  # last steps, whose times define the usual one


class Watchdog:
    """A thread that monitors its creator; a context manager around the training loop.

    A step may take twice the slowest of the last steps, and at least `min_timeout_s`: the first
    steps, which compile, have no limit. A stall is logged once; the run continues.
    """

    def __init__(self, log: Callable[[str], None], min_timeout_s: float):
        self._log, self._min_timeout_s = log, min_timeout_s
        self._monitored = threading.get_ident()
        self._times: deque[float] = deque(maxlen=RECENT)
        self._phase, self._step = "starting", 0
        self._begin, self._reported = time.monotonic(), False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fastssl-watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end.set()
        self._thread.join()

    def phase(self, name: str) -> None:
        """Set the phase of the monitored thread."""
        self._phase = name

    def step_done(self, step: int) -> None:
        """A step is complete; its time counts as usual unless it was logged as a stall."""
        now = time.monotonic()
        if not self._reported:
            self._times.append(now - self._begin)
        self._step, self._begin, self._reported = step, now, False

    def batches(self, epoch: Iterable[Item]) -> Iterator[Item]:
        """The epoch's batches; waiting for one is the phase "waiting for data"."""
        self.phase("waiting for data")
        for batch in epoch:
            self.phase("in the step")
            yield batch
            self.phase("waiting for data")

    def allowed_s(self) -> float:
        """Seconds that a step may take now; infinite until a usual time is known."""
        times = list(self._times)
        if len(times) < 5:
            return float("inf")
        return max(self._min_timeout_s, 2 * max(statistics.median(times), sorted(times)[-2]))

    def _run(self) -> None:
        while not self._end.wait(min(1.0, self._min_timeout_s / 4)):
            waited = time.monotonic() - self._begin
            if not self._reported and waited > self.allowed_s():
                self._reported = True
                frame = sys._current_frames().get(self._monitored)
                stack = "".join(traceback.format_stack(frame)) if frame else "(no stack)"
                self._log(
                    f"step {self._step + 1} has taken {waited:.1f} s, twice its usual time, "
                    f"{self._phase}; its stack:\n{stack}"
                )
