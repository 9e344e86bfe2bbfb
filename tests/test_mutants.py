"""The list of mutants that count for nothing names changes that can be made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.mutants.judged import JUDGED
from tests.mutants.mutating import count, mutant

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(("file", "line", "what"), JUDGED, ids=[f"{file} {what}" for file, _, what in JUDGED])
def test_what_was_judged_is_there(file: str, line: str, what: str) -> None:
    source = (ROOT / file).read_text()
    lines = source.splitlines()
    made = [(lines[at - 1].strip(), change) for at, change, _ in (mutant(source, n) for n in range(count(source)))]
    assert (line, what) in made
