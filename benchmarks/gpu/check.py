"""Part "check": whether the kernels are correct on this GPU; it runs before anything is timed.

Each step is a process of its own with a time box: an illegal address in one leaves the others alone. What a failing
step printed last is kept in its row; hypothesis ends with the smallest failing case, and the sweep tries small cases
first and stops at one that fails.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.record import ROOT, Growing

LONGEST = 240  # seconds of a step
LINES = 40  # that are kept of a step that failed


@dataclass(frozen=True)
class Step:
    """One row.

    Attributes:
        name: what is checked.
        command: arguments of Python, or of the tool.
        tool: a program that runs Python; the step is left out where it is missing.
        environment: more of it.
    """

    name: str
    command: tuple[str, ...]
    tool: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


ONE_PASS = "tests/laws/kernels/test_one_pass_candidate.py"
LAWS = {
    "laws of the kernels": f"--ignore={ONE_PASS} tests/laws/kernels",
    "laws of attention": "tests/laws/test_attention_laws.py",
    "features": "tests/test_attention_features.py",
    "hidden pairs": "tests/laws/test_hidden_pairs.py",
    "split lines": "tests/laws/test_heavy_lines.py",
    "tables made on the device, without waiting for it": "tests/laws/test_dynamic_tables.py",
    "routing, without waiting for the device": "tests/test_routing.py",
    "decoding": "tests/laws/test_decode.py",
    "CUDA graphs": "tests/test_cuda_graphs.py",
    "backward in one pass, a candidate": ONE_PASS,
    "forward in Gluon, a candidate": "tests/kernels/test_gluon_candidate.py",
}
ON_THE_GPU = {"SPARSEFLASH_TEST_BACKEND": "triton"}
SANITIZER = "compute-sanitizer"


def steps(examples: int = 100, workers: int = 8) -> Iterator[Step]:
    """What is checked, in order of how much rests on it.

    Args:
        examples: of each law.
        workers: processes of each step that runs tests.
    """
    several = ("-n", str(workers)) if importlib.util.find_spec("xdist") else ()
    drawn = {**ON_THE_GPU, "SPARSEFLASH_EXAMPLES": str(examples)}
    laws = {
        name: Step(name, ("-m", "pytest", *several, *paths.split()), environment=drawn) for name, paths in LAWS.items()
    }
    yield laws.pop("laws of the kernels")
    sweep = ("-m", "pytest", "-x", *several, "tests/laws/test_sweep.py")
    yield Step("every dtype, head dim and block size", sweep, environment=ON_THE_GPU)
    yield Step("a million tokens, and addresses past 2^31 elements", ("-m", "benchmarks.gpu.long"))
    yield laws.pop("tables made on the device, without waiting for it")
    yield laws.pop("laws of attention")
    # The allocator's own cache would hide an access past the end of a tensor.
    careful = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool, head_dims in (("memcheck", ()), ("racecheck", ("128",))):
        command = (SANITIZER, "--tool", tool, "--error-exitcode", "9")
        yield Step(f"{SANITIZER} {tool}", ("-m", "benchmarks.gpu.small", *head_dims), command, careful)
    yield from laws.values()


def measure(step: Step, seconds: float, longest: float = LONGEST) -> dict[str, Any]:
    """Whether a step passes, within its time."""
    if step.tool and shutil.which(step.tool[0]) is None:
        return {"left_out": f"{step.tool[0]} is not on the PATH"}
    allowed = min(seconds, longest)
    process = subprocess.Popen(
        [*step.tool, sys.executable, *step.command],
        env={**os.environ, "PYTHONPATH": str(ROOT), **step.environment}, cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=allowed)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the workers that it started
        said, _ = process.communicate()
        return {"passed": False, "failed": f"stopped after {allowed:.0f} s", "said": _tail(said)}
    if process.returncode == 0:
        return {"passed": True, "summary": _summary(said)}
    return {"passed": False, "failed": f"exit status {process.returncode}", "said": _tail(said)}


def _summary(text: str) -> str:
    """What pytest counts, or the last line with something in it; without colours."""
    said = [line for line in re.sub(r"\x1b\[[\d;]*m", "", text).splitlines() if line.strip()]
    found = next((line for line in reversed(said) if re.search(r"\d+ passed", line)), said[-1] if said else "")
    return found.strip("= ")


def _tail(text: str) -> list[str]:
    return text.splitlines()[-LINES:]


def run(
    seconds: float,
    path: Path | None = None,
    todo: Callable[[], Iterator[Step]] = steps,
    longest: float = LONGEST,
    say: Callable[[str], object] = print,
    again: bool = False,
    at_once: int = 1,
) -> bool:
    """Take the steps that are missing, so many at once; whether every one was taken and none failed."""
    results = Growing("check", path)
    by_name = {step.name: step for step in todo()}

    end = time.monotonic() + seconds

    def one(asked: Mapping[str, Any], left: float | None = None) -> Mapping[str, Any]:
        found = measure(by_name[asked["step"]], end - time.monotonic() if left is None else left, longest)
        said = found.get("said", [])
        say("\n".join([f"  {asked['step']}: {verdict(found)}", *(f"    {line}" for line in said)]))
        return found

    def retried(row: Mapping[str, Any]) -> bool:
        return again and "failed" in row

    asked = ({"step": name} for name in by_name)
    if at_once > 1:
        finished = results.go_on_abreast(asked, one, seconds, ThreadPoolExecutor, at_once, say, retried)
    else:
        finished = results.go_on(asked, one, seconds, say, retried)
    failures = [row["step"] for row in results.rows if "failed" in row]
    if failures:
        say(f"check: FAILED: {', '.join(failures)}; --again takes failed steps again")
    return finished and not failures


def verdict(row: Mapping[str, Any]) -> str:
    """A row in words.

    Example:
        >>> verdict({"passed": True, "summary": "9 passed, 2 skipped in 3.1s"})
        'passed (9 tests)'
        >>> verdict({"passed": False, "failed": "stopped after 90 s"})
        'not finished in 90 s'
    """
    if row.get("passed"):
        counted = _counted(row["summary"])
        return f"passed ({counted})" if counted else "passed"
    if "left_out" in row:
        return f"not run ({row['left_out']})"
    stopped = re.fullmatch(r"stopped after (\d+ s)", row["failed"])
    return f"not finished in {stopped[1]}" if stopped else f"failed ({row['failed']})"


def _counted(summary: str) -> str:
    """How much a step that passed did, if its last line says so."""
    if found := re.search(r"(\d+) passed", summary):
        return f"{found[1]} test{'s' * (found[1] != '1')}"
    # Progress of few tests, the only line: pytest begins a new one after some seventy.
    if found := re.fullmatch(r"([.sx]+) +\[100%\]", summary):
        return f"{found[1].count('.')} tests"
    if found := re.search(r"(\d+) errors?$", summary):
        return found[0]
    return summary if re.match(r"\d+ of \d+ ", summary) else ""
