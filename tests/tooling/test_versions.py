"""The versions that `make versions` exercises are those that the package asks for and CI runs on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.versions import SUPPORTED, TESTS, Versions, installed

ROOT = Path(__file__).parents[2]


def test_supported_versions_begin_with_the_oldest_asked_for_and_end_with_the_pinned() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    oldest = {m[1]: m[2] for line in asked if (m := re.match(r"(torch|triton)>=([\d.]+)", line))}
    assert SUPPORTED[0].torch.startswith(oldest["torch"] + ".")
    assert SUPPORTED[0].triton.startswith(oldest["triton"] + ".")
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split() if "==" in line)
    assert (SUPPORTED[-1].torch, SUPPORTED[-1].triton) == (pinned["torch"], pinned["triton"])


def test_what_they_run_is_there() -> None:
    for name in TESTS:
        assert (ROOT / name).exists(), name


def test_an_environment_that_is_ready_is_not_made_again(tmp_path: Path) -> None:
    (tmp_path / "ready").touch()
    assert installed(Versions("0.0.1", "0.0.1", "numpy"), tmp_path) is None
