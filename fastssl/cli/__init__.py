"""The `fastssl` command: dispatch and exit codes. A user error prints one line and exits with code
2."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastssl.cli import catalog_commands, dataset_commands, run_commands
from fastssl.cli.console import accept_any_encoding
from fastssl.cli.errors import one_line
from fastssl.cli.parsing import UsageError
from fastssl.config import suggestion
from fastssl.runtime.environment import provide_user
from fastssl.runtime.signals import Interrupted, stop_signals

USAGE = """usage: fastssl COMMAND ...

  fastssl train RECIPE [--data PATH] [--run DIR] [--knob value ...]
                                   pretrain, evaluate, print the table
  fastssl train RECIPE --help      every knob, with the recipe's value
  fastssl train RECIPE --dry-run [--measure]
                                   parameters, memory, steps, the batch size that fits, and with
                                   --measure their time; writes nothing
  fastssl eval RUN [--protocol neutral|multiview|patches] [--probe lbfgs|ridge|sgd ...]
                                   repeat a run's evaluation, or follow a paper's protocol
  fastssl rank RUN                 label-free quality: RankMe, LiDAR, alpha-ReQ
  fastssl select RUN RUN ...       rank runs of one method by each of these
  fastssl views RECIPE [--data PATH] [--out FILE.png] [--knob value ...]
                                   plot images and their views with the sampled parameters
  fastssl recipes                  list the recipes
  fastssl methods                  list the methods: paper, formula, defaults, measured accuracy
  fastssl convert SOURCE TARGET [--part train] [--size S] [--quality Q]
                                   images to .npy, .beton or tar shards; resumes
  fastssl doctor --data PATH [--workers N]
                                   decode every image and report problems
  fastssl COMMAND --help           the arguments of a command
  fastssl --version                the version
"""
COMMANDS = {
    "train": run_commands.train,
    "eval": run_commands.evaluate,
    "rank": run_commands.rank,
    "select": run_commands.select,
    "views": catalog_commands.views,
    "recipes": catalog_commands.recipes,
    "methods": catalog_commands.methods,
    "convert": dataset_commands.convert,
    "doctor": dataset_commands.doctor,
}
RESUMED = {  # printed after an interruption; the other commands start again
    "train": "; the same command resumes the run",
    "convert": "; the same command resumes",
    "eval": "; the same command resumes",
}


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `fastssl` command."""
    accept_any_encoding()
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code: 0, 2 after a user error, 128 + N after signal
    N."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        print(f"fastssl {_version()}")
        return 0
    provide_user()
    try:
        if name not in COMMANDS:
            raise UsageError(f"unknown command {name!r}; {suggestion(name, COMMANDS)}")
        with stop_signals(), _warnings_in_one_line():
            COMMANDS[name](arguments[1:])
    except UsageError as error:  # the same on every rank
        _print_error(error, only_on_rank_0=True)
        return 2
    except Interrupted as stop:
        print(f"fastssl: {stop}{RESUMED.get(name, '')}", file=sys.stderr)
        return stop.exit_code
    except Exception as error:
        if getattr(error, "is_reported", False):  # another rank has printed the reason
            return getattr(error, "exit_code", 2)
        if (line := one_line(error)) is None:
            raise
        _print_error(line)
        return 2
    return 0


def _print_error(error: Exception | str, *, only_on_rank_0: bool = False) -> None:
    """Print an error in one line, under torchrun with the rank that it is of."""
    rank = os.environ.get("RANK", "0")
    if rank == "0" or not only_on_rank_0:
        of_rank = "" if rank == "0" else f"rank {rank}: "
        print(f"fastssl: {of_rank}{' '.join(str(error).split())}", file=sys.stderr)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("fastssl-torch")
    except PackageNotFoundError:
        return "(not installed: run from its sources)"


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Print fastssl's warnings without their source line."""
    show = warnings.showwarning

    def log(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if category.__module__.startswith("fastssl"):
            print(f"fastssl: warning: {message}", file=sys.stderr)
        else:
            show(message, category, *args, **kwargs)

    warnings.showwarning = log
    try:
        yield
    finally:
        warnings.showwarning = show
