"""Which changes are tried, which count for nothing, and which tests are asked about each."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.__main__ import files_of
from tests.mutants.allowed import JUDGED
from tests.mutants.coverage_map import Reach
from tests.mutants.operators import count, mutant

ROOT = Path(__file__).parent.parent


@cache  # a module of many changes takes seconds
def made(file: str) -> set[tuple[str, str]]:
    """(line, change) of each mutant of a module."""
    source = (ROOT / file).read_text()
    lines = source.splitlines()
    return {(lines[at - 1].strip(), change) for at, change, _ in (mutant(source, n) for n in range(count(source)))}


@pytest.mark.parametrize(("file", "line", "what"), JUDGED, ids=[f"{file} {what}" for file, _, what in JUDGED])
def test_what_was_judged_is_there(file: str, line: str, what: str) -> None:
    assert (line, what) in made(file)


def test_only_the_named_modules_are_changed() -> None:
    folders = ROOT / "patterns", ROOT / "sparseflash/pictures"
    assert files_of("patterns", ["pixels", "tiles"]) == [folders[0] / "tiles.py", folders[1] / "pixels.py"]
    every = [path for folder in folders for path in sorted(folder.glob("*.py")) if path.name != "__init__.py"]
    assert files_of("patterns") == every
    with pytest.raises(ValueError, match=r"no module 'pixel' in patterns: expected some of .*, pixels, "):
        files_of("patterns", ["drawing", "pixel"])


def test_the_tests_that_meet_a_line_the_quickest_first(tmp_path: Path) -> None:
    file, met = tmp_path / "some.py", tmp_path / "met.json"
    lines = {1: [""], 3: [""], 4: ["slow", "quick"], 6: ["slow"], 7: []}
    met.write_text(json.dumps({"seconds": {"slow": 2.0, "other": 1.0, "quick": 0.1}, "lines": {str(file): lines}}))
    reach = Reach(met)
    assert reach.tests(file, 4) == reach.tests(file, 5) == ["quick", "slow"]  # line 5 goes on with line 4
    assert reach.tests(file, 6) == ["slow"]
    assert reach.tests(file, 7) == []
    assert reach.tests(file, 3) == ["quick", "other", "slow"]  # run by the import


COUNTED = """
from pathlib import Path
import pytest
from tests.mutants.coverage_map import Met, Only, Reach
here = Path.cwd()
met = Met([here / "halves.py"])
assert pytest.main(["-q", "-p", "no:cacheprovider", "test_halves.py"], [met]) == 0
met.write(here / "met.json")
tests = Reach(here / "met.json").tests
print([tests(here / "halves.py", line) for line in (1, 2, 3, 4)])
pytest.main(["-q", "-p", "no:cacheprovider", "test_halves.py"], [Only(["test_halves.py::test_odd"])])
"""


def test_lines_are_met_by_tests(tmp_path: Path) -> None:
    (tmp_path / "halves.py").write_text("def half(x):\n    if x % 2:\n        return None\n    return x // 2\n")
    (tmp_path / "test_halves.py").write_text(
        "from halves import half\n\n\ndef test_odd():\n    assert half(3) is None\n\n\n"
        "def test_even():\n    assert half(4) == 2\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", COUNTED], cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"},
        capture_output=True, text=True, check=True, timeout=100,
    ).stdout  # fmt: skip
    both = ["test_halves.py::test_even", "test_halves.py::test_odd"]
    reached = ast.literal_eval(next(line for line in found.splitlines() if line.startswith("[[")))
    assert [sorted(tests) for tests in reached] == [both, both, both[1:], both[:1]]
    assert "1 passed, " not in found
    assert found.splitlines()[-1].startswith("1 passed in")
