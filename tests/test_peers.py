"""`make test-peers` fails on what is not declared, and its counts are those of its tests."""

from pathlib import Path

import pytest

from tests.peers.outcomes import Outcomes, Suite

SAMPLE = """
import pytest
def test_passes(): pass
def test_wrong(): assert False
@pytest.mark.parametrize("x", [1, 2])
def test_other(x): pass
def test_absent(): pytest.skip("not offered")
"""
PAGE = "| sample 1.0 | 2 | 1 | 1 | 3 |"


def run(folder: Path, **declared: object) -> Outcomes:
    file = folder / "sample.py"
    file.write_text(SAMPLE)
    outcomes = Outcomes(Suite("1.0", lambda folder: [], **declared))  # type: ignore[arg-type]
    pytest.main(
        ["-q", "-p", "no:cacheprovider", "--import-mode=importlib", "-c", "/dev/null", str(file)],
        plugins=[outcomes],
    )
    outcomes.check_table("sample", PAGE)
    return outcomes


def test_declared(tmp_path: Path) -> None:
    outcomes = run(
        tmp_path,
        not_offered=("not offered",),
        inapplicable={"test_other[*": "other"},
        expected_failures={"test_wrong": "a reason"},
    )
    assert outcomes.undeclared == []
    assert outcomes.line("sample") == (
        "sample 1.0: 1 of 2 passed, 1 expected to fail, 3 do not apply (other 2, not offered 1)"
    )


def test_undeclared(tmp_path: Path) -> None:
    """A failure, a skip, a pass where a failure is expected, a stale pattern, other counts."""
    outcomes = run(tmp_path, expected_failures={"test_passes": "a reason", "test_gone": "another"})
    found = "\n".join(outcomes.undeclared)
    assert len(outcomes.undeclared) == 5, found
    for problem in (
        "test_wrong failed",
        "test_absent was skipped: not offered",
        "test_passes failed",
        "'test_gone' matches no test",
        "kernels/README.md should have the row | sample 1.0 | 2 | 2 | 0 | 1 |",
    ):
        assert problem in found
