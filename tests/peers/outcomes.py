"""A suite, what is declared of it, and its counts; what is not declared fails."""

from collections import Counter
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest


class Suite(NamedTuple):
    """One library's tests. A pattern matches names of tests as in fnmatch, but for brackets."""

    version: str  # as in requirements.txt or constraints.txt
    install: Callable[[Path], list[str]]  # (folder of downloads) -> arguments of pytest
    not_offered: tuple[str, ...] = ()  # reasons that the tests may give for skipping themselves
    inapplicable: Mapping[str, str] = MappingProxyType({})  # pattern -> reason
    expected_failures: Mapping[str, str] = MappingProxyType({})  # pattern -> reason


class Outcomes:
    """A pytest plugin: marks what `suite` declares and counts what happens."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite
        self.counts: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()  # of tests that do not apply
        self.undeclared: list[str] = []
        self.unused = {*suite.inapplicable, *suite.expected_failures}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            for reason in self._declared(self.suite.inapplicable, item.name)[:1]:
                item.add_marker(pytest.mark.skip(reason=reason))
            for reason in self._declared(self.suite.expected_failures, item.name):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
        self.undeclared += [f"{pattern!r} matches no test" for pattern in sorted(self.unused)]

    def _declared(self, patterns: Mapping[str, str], name: str) -> list[str]:
        """The reasons whose pattern matches."""
        found = [p for p in patterns if fnmatchcase(name, p.replace("[", "[[]"))]
        self.unused.difference_update(found)
        return [patterns[p] for p in found]

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.undeclared.append(f"{report.nodeid} failed")
        elif report.skipped and hasattr(report, "wasxfail"):
            self.counts["expected failures"] += 1
        elif report.skipped:
            self._skipped(report.nodeid, report.longrepr[2].removeprefix("Skipped: "))
        elif report.when == "call":
            self.counts["passed"] += 1

    def _skipped(self, test: str, reason: str) -> None:
        self.counts["inapplicable"] += 1
        self.reasons[reason] += 1
        if reason not in {*self.suite.not_offered, *self.suite.inapplicable.values()}:
            self.undeclared.append(f"{test} was skipped: {reason}")

    def line(self, name: str) -> str:
        """The counts, with the reasons why tests do not apply."""
        passed, failed, others = self._numbers()
        why = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        return (
            f"{name} {self.suite.version}: {passed} of {passed + failed} passed, "
            f"{failed} expected to fail, {others} do not apply" + (f" ({why})" if why else "")
        )

    def check_table(self, name: str, page: str) -> None:
        """The page must have the suite's row: library, apply, pass, fail, do not apply."""
        passed, failed, others = self._numbers()
        cells = f"{name} {self.suite.version}", passed + failed, passed, failed, others
        row = f"| {' | '.join(map(str, cells))} |"
        if row not in page:
            self.undeclared.append(f"kernels/README.md should have the row {row}")

    def _numbers(self) -> tuple[int, int, int]:
        return (
            self.counts["passed"],
            self.counts["expected failures"],
            self.counts["inapplicable"],
        )
