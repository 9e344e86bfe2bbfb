"""Which tests meet a line of a module, and how long each takes: the others cannot notice a change of it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import coverage
import pytest


class Met:
    """A plugin that counts the lines of some files which each test meets, from here to `write`.

    Begun before the files are imported: lines that an import runs are met by no test, but by all.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.seconds: dict[str, float] = {}
        self.coverage = coverage.Coverage(data_file=None, include=[str(file.resolve()) for file in files])
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        yield
        self.coverage.switch_context("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def write(self, path: Path) -> None:
        self.coverage.stop()
        data = self.coverage.get_data()
        lines = {}
        for file in self.files:
            met = data.contexts_by_lineno(str(file.resolve()))
            statements = self.coverage.analysis2(str(file.resolve()))[1]
            lines[str(file)] = {line: met.get(line, []) for line in statements}
        path.write_text(json.dumps({"seconds": self.seconds, "lines": lines}))


class Reach:
    """What `Met` wrote."""

    def __init__(self, path: Path) -> None:
        found: dict[str, Any] = json.loads(path.read_text())
        self.seconds: dict[str, float] = found["seconds"]
        self.lines = {
            Path(file): {int(line): set(tests) for line, tests in lines.items()}
            for file, lines in found["lines"].items()
        }

    def tests(self, file: Path, line: int) -> list[str]:
        """The tests that meet the statement of a line, the quickest first; all of them if an import does."""
        lines = self.lines[file]
        statement = max((at for at in lines if at <= line), default=None)
        met = {""} if statement is None else lines[statement]
        return sorted(self.seconds if "" in met else met, key=self.seconds.__getitem__)


class Only:
    """A plugin that lets nothing but these tests run, in this order; all, if none of them is there."""

    def __init__(self, tests: Sequence[str]) -> None:
        self.place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if some := [item for item in items if item.nodeid in self.place]:
            items[:] = sorted(some, key=lambda item: self.place[item.nodeid])
