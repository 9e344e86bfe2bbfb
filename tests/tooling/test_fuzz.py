"""The campaign tool: a short one on the suite's laws, and one on a law that is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS, chosen

ROOT = Path(__file__).parents[2]

WRONG = """
from hypothesis import given, strategies as st

@given(st.integers())
def test_no_number_is_past_a_thousand(n: int) -> None:
    assert n <= 1000

@given(st.integers())
def test_numbers_are_numbers(n: int) -> None:
    assert n == n
"""


def campaign(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.fuzz", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


BUSY = """
import multiprocessing, os, sys, time

def work():
    end = time.process_time() + 0.6
    while time.process_time() < end:
        pass

if __name__ == "__main__":
    from tests.fuzz.campaign import processor_time
    context = multiprocessing.get_context("forkserver")
    before = processor_time()
    workers = [context.Process(target=work) for _ in range(2)]
    for worker in workers: worker.start()
    for worker in workers: worker.join()
    print(processor_time() - before)
"""


def test_the_time_of_processes_that_a_server_started_counts(tmp_path: Path) -> None:
    (tmp_path / "busy.py").write_text(BUSY)
    said = {f"SPARSEFLASH_FUZZ{name}": "1" for name in ("", "_FOLDER", "_SECONDS", "_EXAMPLES")}
    done = subprocess.run(
        [sys.executable, "busy.py"], cwd=tmp_path, env=os.environ | said | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True, timeout=100,
    )  # fmt: skip
    assert float(done.stdout) > 1.1


def test_a_short_campaign_finds_nothing(tmp_path: Path) -> None:
    done = campaign("--minutes", 0.15, "--target", "parser", "--folder", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("parser: 3 laws, ")
    assert done.stdout.endswith(" minutes of processor time, 0 findings\n")


def test_a_finding_is_kept_in_its_smallest_case_and_the_others_go_on(tmp_path: Path) -> None:
    law = tmp_path / "test_wrong.py"
    law.write_text(WRONG)
    found = tmp_path / "found"
    done = campaign("--minutes", 0.12, "--target", law, "--folder", found)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 findings" in done.stdout
    assert "test_wrong.py::test_no_number_is_past_a_thousand" in done.stdout
    text = (found / "test_wrong" / "test_no_number_is_past_a_thousand.txt").read_text()
    assert "n=1001" in text
    assert "again: python -m tests.fuzz --minutes 1 --target" in text
    assert "@reproduce_failure" in text


def test_targets_are_named_and_have_their_files() -> None:
    assert all((ROOT / file).exists() for target in TARGETS.values() for file in target.files)
    with pytest.raises(ValueError, match=r"TARGET must be of patterns, parser, .* or a test file; got 'kernels'"):
        chosen("kernels")
