"""`python -m tests.peers DOWNLOADS [SUITE]`: one line for each suite, or one with all output."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers.outcomes import Outcomes
from tests.peers.suites import SUITES

ROOT = Path(__file__).parents[2]


def run_suite(name: str, downloads: Path) -> int:
    """Run one suite in this process, which its substitutions change for good."""
    outcomes = Outcomes(SUITES[name])
    sys.path[:0] = [str(path) for path in downloads.iterdir() if path.suffix != ".gz"]
    arguments = SUITES[name].install(downloads)
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-c", os.devnull]
    status = pytest.main([*options, f"--rootdir={downloads}", *arguments], plugins=[outcomes])
    outcomes.check_table(name, (ROOT / "kernels" / "README.md").read_text())
    print("\n".join(outcomes.undeclared))
    print(outcomes.line(name))
    return int(status != 0 or bool(outcomes.undeclared))


def run_all(downloads: Path) -> int:
    failed = 0
    for name in SUITES:
        command = [sys.executable, "-m", "tests.peers", str(downloads), name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            print(done.stdout, done.stderr, sep="\n")
            failed = 1
        else:
            print(done.stdout.splitlines()[-1], flush=True)
    return failed


if __name__ == "__main__":
    _, folder, *chosen = sys.argv
    downloads = Path(folder).resolve()
    sys.exit(run_suite(chosen[0], downloads) if chosen else run_all(downloads))
