"""A step that hangs is logged within twice its usual time, with phase and stack, once."""

import time
from collections.abc import Iterator

from fastssl.runtime.watchdog import Watchdog

USUAL_S = 0.02


def hang_in_here(seconds: float) -> None:
    time.sleep(seconds)


def test_a_stalled_step_logs_its_phase_and_stack_once() -> None:
    logged: list[tuple[float, str]] = []
    with Watchdog(
        lambda line: logged.append((time.monotonic(), line)), min_timeout_s=0.2
    ) as watchdog:

        def epoch() -> Iterator[int]:
            for number in range(8):
                if number == 6:
                    hang_in_here(1.0)
                yield number

        for number in watchdog.batches(epoch()):
            time.sleep(USUAL_S)
            if number == 6:
                begin = time.monotonic()
                hang_in_here(0.6)
            watchdog.step_done(number + 1)
    assert len(logged) == 1  # the step waited for data and hung again: one step, one report
    assert "step 7 has taken" in logged[0][1] and "waiting for data" in logged[0][1]
    assert "hang_in_here(1.0)" in logged[0][1] and logged[0][0] < begin - 0.5


def test_first_steps_and_steady_ones_are_not_judged() -> None:
    logged: list[str] = []
    with Watchdog(logged.append, min_timeout_s=0.1) as watchdog:
        time.sleep(0.3)  # compiling
        for step in range(10):
            time.sleep(USUAL_S)
            watchdog.step_done(step)
    assert logged == []
