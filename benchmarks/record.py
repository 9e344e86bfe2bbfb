"""Result files, with the provenance of every committed figure: machine, versions, commit, command, date."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import BrokenExecutor, Executor, as_completed
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KERNELS = ROOT / "kernels"
PACKAGES = ("torch", "triton", "numpy", "scipy")


def provenance() -> dict[str, Any]:
    """Where and with what a figure was measured."""
    import torch

    cpu = next(
        (line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "commit": (_git("rev-parse", "--short", "HEAD") or "unknown")
        + ("+changes" if _git("status", "--porcelain", "--", ".", ":!results") else ""),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
    }


Row = dict[str, Any]


def write(part: str, rows: list[dict[str, Any]], path: Path | None = None, **more: Any) -> Path:
    """One JSON file: results/<device>/<date>-<part>.json, or another path; written whole or not at all."""
    where = provenance()
    path = path or result_path(part, where)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"part": part, **where, **more, "rows": rows}, indent=1) + "\n")
    temporary.replace(path)
    return path


def result_path(part: str, where: dict[str, Any] | None = None) -> Path:
    """Where `write` puts what is measured on this machine today."""
    where = where or provenance()
    folder = RESULTS / "".join(c if c.isalnum() else "-" for c in where["device"].lower()).strip("-")
    return folder / f"{where['date'][:10]}-{part}.json"


# Files of kernels/ on which nothing depends that a GPU does.
NOT_ON_A_GPU = ("cpu/*.py", "triton/report.py", "triton/sass.py")


def source(skip: Iterable[str] = NOT_ON_A_GPU, folder: Path = KERNELS) -> str:
    """A digest of the kernels' source, some files left out: figures of other kernels are not these kernels' figures."""
    found = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.toml")]):
        if not any(path.match(pattern) for pattern in skip):
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:12]


class Growing:
    """A result file that is written after every row, and goes on where it stopped.

    Args:
        part: its name, as for :func:`write`.
        path: the file; default what :func:`result_path` says.
        skip: files of kernels/ on which the rows do not depend.
        more: plain data for its head.

    A row is known by the fields that it was asked for with, and by the kernels it was measured with.
    """

    def __init__(self, part: str, path: Path | None = None, skip: Iterable[str] = NOT_ON_A_GPU, **more: Any) -> None:
        self.part, self.more = part, more
        self.path = path or result_path(part)
        self.rows: list[Row] = json.loads(self.path.read_text())["rows"] if self.path.exists() else []
        self.source = source(skip)

    def find(self, asked: Mapping[str, Any]) -> Row | None:
        """The row with these fields, if it was measured with these kernels."""
        wanted = {**asked, "source": self.source}
        return next((row for row in self.rows if wanted.items() <= row.items()), None)

    def add(self, asked: Mapping[str, Any], found: Mapping[str, Any]) -> Row:
        """Write a row in the place of one that was asked for with the same fields."""
        row = {**asked, **found, "source": self.source}
        self.rows = [other for other in self.rows if not asked.items() <= other.items()] + [row]
        write(self.part, self.rows, self.path, **self.more)
        return row

    def go_on(
        self,
        asked: Iterable[Mapping[str, Any]],
        measure: Callable[[Mapping[str, Any], float], Mapping[str, Any]],
        seconds: float,
        say: Callable[[str], object] = print,
        again: Callable[[Row], bool] = lambda row: False,
        alive: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Measure the rows that are missing, in order. A row whose measuring raises has the reason under "failed".

        Args:
            asked: what each row is to be known by: plain fields that compare by value after a trip through JSON.
            measure: given these and the seconds that are left, the rest of the row.
            seconds: no row begins after that long.
            say: told what is measured.
            again: whether a row that is there is to be measured once more.
            alive: whether the device still works after a row that raised; if not, a new process must go on.

        Returns:
            Whether all rows are there.
        """
        end = time.monotonic() + seconds
        todo = [one for one in asked if (row := self.find(one)) is None or again(row)]
        for number, one in enumerate(todo):
            left = end - time.monotonic()
            if left <= 0:
                say(f"{self.part}: time is up, {len(todo) - number} of its rows are missing; the same command goes on")
                return False
            say(f"{self.part}, row {number + 1} of {len(todo)}: {', '.join(f'{k} {v}' for k, v in one.items())}")
            try:
                self.add(one, measure(one, left))
            except Exception as error:  # the other rows are still wanted
                row = self.add(one, {"failed": f"{type(error).__name__}: {str(error).strip()[:600]}"})
                say(f"  FAILED: {row['failed']}")
                if not alive():
                    say(f"{self.part}: the device does not answer after that; the same command goes on behind it")
                    return False
        return True

    def go_on_abreast(
        self,
        asked: Iterable[Mapping[str, Any]],
        measure: Callable[[Mapping[str, Any]], Mapping[str, Any]],
        seconds: float,
        pool: Callable[[int], Executor],
        at_once: int,
        say: Callable[[str], object] = print,
        again: Callable[[Row], bool] = lambda row: False,
    ) -> bool:
        """The same, so many rows at once: each lot ends before the next one begins.

        Args:
            asked: as for :meth:`go_on`.
            measure: given these fields, the rest of the row; goes to the pool.
            seconds: no lot begins after that long.
            pool: of so many threads or processes, a new one for each lot.
            at_once: rows in a lot.
            say: told what was measured.
            again: as for :meth:`go_on`.

        Returns:
            Whether all rows are there.
        """
        end = time.monotonic() + seconds
        todo = [one for one in asked if (row := self.find(one)) is None or again(row)]
        for start in range(0, len(todo), at_once):
            if time.monotonic() > end:
                say(f"{self.part}: time is up, {len(todo) - start} of its rows are missing; the same command goes on")
                return False
            with pool(at_once) as workers:
                running = {workers.submit(measure, one): one for one in todo[start : start + at_once]}
                for done in as_completed(running):
                    one = running[done]
                    say(f"{self.part}: {', '.join(f'{k} {v}' for k, v in one.items())}")
                    try:
                        self.add(one, done.result())
                    except BrokenExecutor as error:  # one process died, and which is not said: these rows stay missing
                        say(f"  not measured: {error}")
                    except Exception as error:  # the other rows are still wanted
                        row = self.add(one, {"failed": f"{type(error).__name__}: {str(error).strip()[:600]}"})
                        say(f"  FAILED: {row['failed']}")
        return all(self.find(one) for one in todo)


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec else sys.argv[0]


def package_version(name: str) -> str:
    """The version that is installed, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    except OSError:  # no git on this machine
        return ""
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
