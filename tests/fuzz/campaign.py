"""A pytest plugin that runs the hypothesis laws it collects over and over until its time is up.

Every round of a law draws new cases. A law that fails is reported with its smallest case and rests from then on; the
others go on. What was run is written to a status file, which the campaign's parent reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import time
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.database import DirectoryBasedExampleDatabase

import tests.conftest  # noqa: F401 - the profile "suite", also where a law lies elsewhere

TARGET = os.environ["SPARSEFLASH_FUZZ"]
FOLDER = Path(os.environ["SPARSEFLASH_FUZZ_FOLDER"])
SECONDS = float(os.environ["SPARSEFLASH_FUZZ_SECONDS"])
EXAMPLES = int(os.environ["SPARSEFLASH_FUZZ_EXAMPLES"])
MEMORY = 8 << 30  # bytes: a case that asks for more is a finding, and must not be the end of its neighbours


resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))


def processor_time() -> float:
    """Seconds of this process and of all that came from it: ranks compute while their parent waits.

    Those that have ended are in the figures of whoever started them, which may be a server of processes.
    """
    parents, seconds = {}, {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = file.read_text().rpartition(")")[2].split()
            pid = int(file.parent.name)
            parents[pid] = int(fields[1])
            seconds[pid] = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")  # utime, stime, cutime, cstime
    here = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in here} - here:
        here |= more
    return sum(seconds[pid] for pid in here)


class Campaign:
    """Counts cases, keeps time and writes findings down."""

    def __init__(self) -> None:
        self.cases: dict[str, int] = {}
        self.findings: list[str] = []
        self.told = 0.0

    def over(self) -> bool:
        # Processor time: a machine that others use, or that pauses this process, makes a campaign no longer.
        return processor_time() > SECONDS

    def tell(self, law: str, now: bool = False) -> None:
        """Write the status down, once a second at most unless it matters ``now``."""
        if now or time.monotonic() - self.told > 1:
            self.told = time.monotonic()
            status = {"law": law, "seconds": processor_time(), "cases": self.cases, "findings": self.findings}
            temporary = FOLDER / ".status.json"
            temporary.write_text(json.dumps(status))
            os.replace(temporary, FOLDER / "status.json")

    def counted(self, item: pytest.Item) -> None:
        """Let every case of a law be counted."""
        handle = item.obj.hypothesis  # type: ignore[attr-defined]
        law = handle.inner_test
        if not hasattr(law, "counted"):

            @wraps(law)
            def count(*args: Any, **kwargs: Any) -> Any:
                self.cases[item.nodeid] += 1
                self.tell(item.nodeid)
                return law(*args, **kwargs)

            count.counted = True  # type: ignore[attr-defined]
            handle.inner_test = count
        self.cases.setdefault(item.nodeid, 0)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if hasattr(getattr(item, "obj", None), "hypothesis")]
        for item in items:
            self.counted(item)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        if not session.items or session.testsfailed:
            raise pytest.UsageError("no laws to run here")
        while left := [item for item in session.items if item.nodeid not in self.findings]:
            for item in left:
                if self.over():
                    return True
                item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                self.tell(item.nodeid, now=True)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.findings:
            self.findings.append(report.nodeid)
            name = report.nodeid.rpartition("::")[2].translate({ord(c): "_" for c in "/[]<>:,. "})
            command = f"python -m tests.fuzz --minutes 1 --target {TARGET} --again {report.nodeid!r}"
            text = f"{report.nodeid}\n\nagain: {command}\n\n{report.longreprtext}\n"
            (FOLDER / f"{name}.txt").write_text(text)
            self.tell(report.nodeid, now=True)


def pytest_configure(config: pytest.Config) -> None:
    settings.register_profile(
        "fuzz",
        settings.get_profile("suite"),
        max_examples=EXAMPLES,
        derandomize=False,
        database=DirectoryBasedExampleDatabase(FOLDER / "examples"),
        print_blob=True,
    )
    settings.load_profile("fuzz")
    config.pluginmanager.register(Campaign())
