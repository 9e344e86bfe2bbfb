"""The compiled CPU kernel touches nothing outside of its operands and results: see ``tests.kernels.guarded``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseflash.kernels.cpu import levels, native

ROOT = Path(__file__).parent.parent.parent
LEVELS = [level.name for level in levels.runnable(native.capabilities()) if level.library.exists()]

pytestmark = [
    pytest.mark.tier2,
    pytest.mark.skipif(sys.platform == "win32", reason="no mprotect"),
    pytest.mark.skipif(not LEVELS, reason="no compiled kernel here"),
]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("place", ["start", "end"])
def test_nothing_outside_of_tensors_is_touched(level: str, place: str) -> None:
    environment = os.environ | {native.VARIABLE: level, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.kernels.guarded", place, "0", "25"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"25 problems at the {place} of pages" in done.stdout


def test_the_guard_is_at_work() -> None:
    """A result of which a line too few is there ends the process."""
    faulty = (
        "from sparseflash.kernels.cpu import native\n"
        "import torch; from tests.kernels import guarded; from tests.kernels.cpu_problems import problem\n"
        "guarded.guard('end')\n"
        "point = native._Call.point\n"
        "native._Call.point = lambda s, n, x: point(s, n, x[..., :-1, :] if n == 'out' else x)\n"
        "one = next(p for p in map(problem, range(100)) if not p.lengths)\n"
        "one.results()\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", faulty], env=environment, cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -11
