"""The list of mutants that count for nothing names changes that can be made, and modules can be chosen by name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.mutants.__main__ import files_of
from tests.mutants.judged import JUDGED
from tests.mutants.mutating import count, mutant

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
    assert files_of("patterns", ["pixels", "drawing"]) == [ROOT / "patterns/drawing.py", ROOT / "patterns/pixels.py"]
    assert files_of("patterns") == sorted(set((ROOT / "patterns").glob("*.py")) - {ROOT / "patterns/__init__.py"})
    with pytest.raises(ValueError, match=r"no module 'pixel' in patterns: expected some of .*, pixels, "):
        files_of("patterns", ["drawing", "pixel"])
