"""``python tests/test_X.py``: runs the file's tests and prints, line by line, what was checked."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest


class _Summary:
    """Counts the results of each test function, under the first line of its docstring."""

    def __init__(self) -> None:
        self.titles: dict[str, str] = {}
        self.results: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            assert isinstance(item, pytest.Function)
            text = (item.function.__doc__ or item.originalname.replace("_", " ")).strip()
            self.titles[item.nodeid] = text.partition("\n")[0]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.results[self.titles[report.nodeid]][report.outcome] += 1

    def print(self) -> None:
        for title, counts in self.results.items():
            verdict = "FAILED" if counts["failed"] else "ok" if counts["passed"] else "skipped"
            cases = counts["passed"] or sum(counts.values())
            print(f"{verdict:>7}  {cases:4d}  {title}")


def main(file: str, *siblings: str) -> int:
    """Runs the tests of ``file``, and of files beside it; 0 when all passed."""
    summary = _Summary()
    files = [file, *(str(Path(file).with_name(name)) for name in siblings)]
    status = pytest.main([*files, "-q", "--no-header", "-p", "no:cacheprovider"], plugins=[summary])
    print("\nchecked (number of cases):")
    summary.print()
    return int(status)
