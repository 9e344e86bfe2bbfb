"""What every committed figure carries: machine, versions, commit, command, date."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
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
        "commit": _git("rev-parse", "--short", "HEAD")
        + ("+changes" if _git("status", "--porcelain", "--", ".", ":!results") else ""),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: package_version(name) for name in PACKAGES},
    }


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


def _module() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec else sys.argv[0]


def package_version(name: str) -> str:
    """The version that is installed, or "absent"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False, cwd=RESULTS.parent)
    return done.stdout.strip()


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []
