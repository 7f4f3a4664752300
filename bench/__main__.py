"""Measure everything this machine can measure: python -m bench --out DIR [--only SUITES]
[--budget-s S].

Each suite writes DIR/SUITE.jsonl: the environment first, then one row per case and variant as soon
as it is measured, the most informative cases first. A case is checked before it is timed; one that
fails its check or does not fit in memory gives a row with the reason. The command ends within the
budget.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from bench.measure import Case, environment, measure

SUITES = ("losses", "pipelines", "loop", "accuracy")
Row = dict[str, Any]


class BudgetSpent(BaseException):
    """The time is over; all measured rows are on disk."""


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--only", default=",".join(SUITES), help="suites to run, separated by commas"
    )
    parser.add_argument(
        "--budget-s", type=float, default=600.0, help="seconds for everything, start-up included"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--match", default="", help="run only the cases whose name contains this text"
    )
    options = parser.parse_args()
    suites = options.only.split(",")
    if unknown := set(suites) - set(SUITES):
        parser.error(f"unknown suites {', '.join(sorted(unknown))}; there are {', '.join(SUITES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    left_s = max(1.0, options.budget_s - _seconds_since_start())
    end = time.monotonic() + left_s
    _stop_at(left_s)
    try:
        for number, suite in enumerate(suites):
            share = (end - time.monotonic()) / (len(suites) - number)
            _run_suite(suite, options, time.monotonic() + share)
    except BudgetSpent:
        print(f"the budget of {options.budget_s:.0f} s is spent; the results are in {options.out}")
    return 0


def _seconds_since_start() -> float:
    """How long this process has run: importing torch takes seconds."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # field 22: since boot
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def _stop_at(budget_s: float) -> None:
    """Interrupt at 97 % of the budget; exit at 100 % where a call has not returned."""

    def interrupt(signal_number: int, frame: FrameType | None) -> None:
        raise BudgetSpent

    def exit_now() -> None:
        print("a call did not return inside the budget", file=sys.stderr, flush=True)
        os._exit(0)

    signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.97 * budget_s)
    timer = threading.Timer(budget_s, exit_now)
    timer.daemon = True
    timer.start()


def _run_suite(suite: str, options: argparse.Namespace, end: float) -> None:
    with open(options.out / f"{suite}.jsonl", "w", buffering=1) as file:
        stamp = {
            "environment": environment(),
            "suite": suite,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        file.write(json.dumps(stamp) + "\n")
        for row in _rows(suite)(options.device, end, options.match):
            _write(file, {"suite": suite, **row})


def _rows(suite: str) -> Callable[[str, float, str], Iterator[Row]]:
    if suite == "accuracy":
        from bench.suites import accuracy

        return accuracy.rows
    if suite == "losses":
        from bench.suites import covariance_losses, softmax_losses

        sources = [covariance_losses.cases, softmax_losses.cases]
    elif suite == "loop":
        from bench.suites import loop_overhead, train_step

        sources = [train_step.cases, loop_overhead.cases]
    else:
        from bench.suites import jpeg_engines, views

        sources = [views.cases, jpeg_engines.cases]

    def rows(device: str, end: float, match: str) -> Iterator[Row]:
        yield from timed_rows(
            [case for cases in sources for case in cases(device) if match in case.name], device, end
        )

    return rows


def timed_rows(cases: list[Case], device: str, end: float) -> Iterator[Row]:
    """Rows of the cases, in order, until `end` (monotonic seconds), with even shares of it."""
    for number, case in enumerate(cases):
        left = end - time.monotonic()
        if left <= 0:
            break
        seconds = min(10.0, left / (len(cases) - number))
        head: Row = {
            "case": case.name,
            "parameters": dict(case.parameters),
            "floor_ms": case.floor_ms,
        }
        try:
            variants = case.build()
            case.check(variants)
            timings = measure(
                variants, device, seconds=seconds, settle_s=case.settle_s, graph=case.graph
            )
        except Exception as error:  # a compiler, a driver or a peer may raise anything
            yield {
                **head,
                "failed": f"{type(error).__name__}: {str(error).split(chr(10))[0]}",
            }
            continue
        finally:
            variants = {}
            if device == "cuda":
                torch.cuda.empty_cache()
        reference = next(iter(timings.values())).ms
        for name, timing in timings.items():
            rates = {
                f"{unit}_per_s": amount / timing.ms * 1e3 for unit, amount in case.work.items()
            }
            yield {
                **head,
                "variant": name,
                **asdict(timing),
                "times_reference": reference / timing.ms,
                **rates,
            }


def _write(file: TextIO, row: Row) -> None:
    file.write(json.dumps(row) + "\n")
    if "failed" in row:
        print(f"{row['case']}: FAILED {row['failed']}", flush=True)
    elif "ms" in row:
        graph = f"  graph {row['graph_ms']:.4f} ms" if row["graph_ms"] else ""
        speed, memory = f"{row['times_reference']:.2f}x", f"{row['peak_mib']:.1f} MiB"
        print(
            f"{row['case']}  {row['variant']}  {row['ms']:.4f} ms{graph}  {speed}  {memory}",
            flush=True,
        )
    else:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # torch's teardown takes seconds that the budget lacks
