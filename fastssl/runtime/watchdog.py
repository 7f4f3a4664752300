"""Says where a run hangs: the phase and the stack of a step that takes twice its usual time."""

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
USUAL = 20  # steps whose times make the usual one


class StallWatch:
    """A thread that watches the one that made it; a context manager around the training loop.

    A step may take twice the slowest of the last steps, and at least `grace_s`: the first steps,
    which compile, are not judged. A stall is told once; the run goes on.
    """

    def __init__(self, say: Callable[[str], None], grace_s: float):
        self._say, self._grace_s = say, grace_s
        self._watched = threading.get_ident()
        self._times: deque[float] = deque(maxlen=USUAL)
        self._phase, self._step, self._begin, self._told = "starting", 0, time.monotonic(), False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="fastssl-stall", daemon=True)

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
        """What the watched thread does from now on."""
        self._phase = name

    def made(self, step: int) -> None:
        """A step is complete; its time is a usual one if it was not told as a stall."""
        now = time.monotonic()
        if not self._told:
            self._times.append(now - self._begin)
        self._step, self._begin, self._told = step, now, False

    def batches(self, epoch: Iterable[Item]) -> Iterator[Item]:
        """The epoch's batches; waiting for one is the phase "waiting for data"."""
        self.phase("waiting for data")
        for batch in epoch:
            self.phase("in the step")
            yield batch
            self.phase("waiting for data")

    def allowed_s(self) -> float:
        """Seconds that a step may take now; infinite before there is a usual time."""
        times = list(self._times)
        if len(times) < 5:
            return float("inf")
        return max(self._grace_s, 2 * max(statistics.median(times), sorted(times)[-2]))

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self._grace_s / 4)):
            waited = time.monotonic() - self._begin
            if not self._told and waited > self.allowed_s():
                self._told = True
                frame = sys._current_frames().get(self._watched)
                stack = "".join(traceback.format_stack(frame)) if frame else "(no stack)"
                self._say(
                    f"step {self._step + 1} has taken {waited:.1f} s, twice its usual time, "
                    f"{self._phase}; its stack:\n{stack}"
                )
