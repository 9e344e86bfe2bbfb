"""The compiled CPU kernel under AddressSanitizer and UBSan: problems at random, on each level that this machine runs.

Scratch counts too: in such a build, memory between the pieces that a thread cuts its scratch into is poisoned.
Building takes a minute a level, so this waits to be asked: ``make sanitize PROBLEMS=300``, or SPARSEFLASH_SANITIZE=300
of pytest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from sparseflash.kernels.cpu import build, levels, native
from tests.kernels.cpu_problems import LIBRARIES

ROOT = Path(__file__).parent.parent.parent
ASKED = os.environ.get("SPARSEFLASH_SANITIZE", "")
# At -O1: sanitized at -O3 a level compiles for minutes.
FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g", "-O1")
RUNNABLE = [level.name for level in levels.runnable(native.capabilities())]


def _runtime() -> Path | None:
    """AddressSanitizer's library, that of the compiler."""
    command = build.compiler()
    if command is None or sys.platform != "linux":
        return None
    try:
        done = subprocess.run([*command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    path = Path(done.stdout.strip())
    return path if done.returncode == 0 and path.is_absolute() and path.exists() else None


def _run(level: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    runtime = _runtime()
    assert runtime is not None
    settings: Mapping[str, str] = {
        "LD_PRELOAD": str(runtime),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own are many
        "UBSAN_OPTIONS": "print_stacktrace=1",
        native.VARIABLE: level,
        LIBRARIES: str(folder),
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.kernels.cpu_problems", *arguments]
    return subprocess.run(command, env=os.environ | settings, cwd=ROOT, capture_output=True, text=True, check=False)


needs_sanitizer = [
    pytest.mark.skipif(not ASKED, reason="compiles for minutes: SPARSEFLASH_SANITIZE=300 runs 300 problems a level"),
    pytest.mark.skipif(_runtime() is None, reason="no compiler with AddressSanitizer here (g++ on Linux has it)"),
]
pytestmark = needs_sanitizer


@pytest.mark.parametrize("level", RUNNABLE)
def test_no_sanitizer_finds_anything(level: str, tmp_path: Path) -> None:
    chosen = [each for each in levels.LEVELS if each.name == level]
    assert build.build(chosen, tmp_path, FLAGS) == {}
    done = _run(level, tmp_path, "0", ASKED)
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{ASKED} problems on {level}" in done.stdout


def test_the_sanitizers_are_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A piece of scratch that is one number short is found."""
    sources = tmp_path / "sources"
    shutil.copytree(Path(build.__file__).parent, sources, ignore=shutil.ignore_patterns("libraries", "__pycache__"))
    text = (sources / "forward.h").read_text()
    whole = "top = s.take(all_lanes)"
    assert text.count(whole) == 1
    (sources / "forward.h").write_text(text.replace(whole, "top = s.take(all_lanes - 1)"))
    monkeypatch.setattr(build, "SOURCE", sources / "kernel.cpp")
    least = [level for level in levels.LEVELS if level.name == RUNNABLE[0]]
    assert build.build(least, tmp_path / "libraries", FLAGS) == {}
    done = _run(RUNNABLE[0], tmp_path / "libraries", "0", "5")
    assert done.returncode != 0
    assert "AddressSanitizer: use-after-poison" in done.stderr, done.stderr[-4000:]
