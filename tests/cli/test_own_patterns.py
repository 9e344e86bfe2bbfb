"""``--import``: patterns of the user's own at the command line; what a file names is told, never imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparseflash.cli.importing import import_modules, told
from sparseflash.utils.imports import UnknownPatternError, checked

ROOT = Path(__file__).parent.parent.parent
MINE = """
from pathlib import Path
from sparseflash import patterns as P

Path("imported").write_text("yes")
P.register("knights_move", lambda q, k: abs(q // 8 - k // 8) * abs(q % 8 - k % 8) == 2)
"""
TINY = ["--layers", "1", "--batch", "2", "--device", "cpu"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def sparseflash(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process of its own, as the installed program: without the current folder on the path."""
    command = [sys.executable, "-P", "-m", "sparseflash", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", ["mine", "./mine.py"])
def test_show_knows_an_imported_pattern(name: str, place: Path) -> None:
    expression = "knights_move() & causal()"
    done = sparseflash("show", expression, "--seq-len", 64, "--block", 16, "--import", name, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_density"] == pytest.approx(168 / 64**2)


def test_bench_knows_an_imported_pattern(place: Path) -> None:
    sizes = ["--seq-len", 64, "--heads", 1, "--runs", 1]
    done = sparseflash("bench", "--pattern", "knights_move()", *sizes, "--import", "mine", "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["pattern"] == "knights_move()"


def test_a_pattern_that_is_not_known_says_how_to_import_one(place: Path) -> None:
    done = sparseflash("show", "knights_move()", "--seq-len", 64)
    assert done.returncode == 2
    assert "no pattern is called 'knights_move'" in done.stderr
    assert "--import the module" in done.stderr


@pytest.mark.tier2
def test_a_run_names_its_modules_and_nothing_imports_them_by_itself(place: Path) -> None:
    run = ["train", "demo", "--out", "run"]
    first = sparseflash(*run, "--pattern", "knights_move() | local(50)", "--import", "mine", "--steps", 1, *TINY)
    assert first.returncode == 0, first.stderr
    assert "mask: knights_move() | local(50): 576 x 576 tokens in blocks of 64 x 64" in first.stderr
    assert "go on with: sparseflash train demo --out run --resume --import mine" in first.stdout

    (place / "imported").unlink()
    for asked, again in (
        ([*run, "--resume", "--steps", 2], "sparseflash train demo --out run --resume --import mine"),
        (["evaluate", "run", "--limit", 2], "sparseflash evaluate run --import mine"),
    ):
        refused = sparseflash(*asked)
        assert refused.returncode == 2
        assert "no pattern is called 'knights_move'" in refused.stderr
        assert f"  {again}\n" in refused.stderr
        assert "whole" not in refused.stderr
        assert not (place / "imported").exists()

    assert sparseflash(*run, "--resume", "--steps", 2, "--import", "./mine.py").returncode == 0
    scored = sparseflash("evaluate", "run", "--limit", 2, "--import", "mine", "--device", "cpu")
    assert scored.returncode == 0, scored.stderr
    assert "mask: knights_move() | local(50)" in scored.stdout

    printed = sparseflash(*run, "--resume", "--import", "mine", "--print-config")
    assert '[patterns]\nimport = ["mine"]\n' in printed.stdout
    (place / "ours.toml").write_text(printed.stdout)
    (place / "imported").unlink()
    preset = ["train", "demo", "--preset", "ours.toml"]
    refused = sparseflash(*preset)
    assert refused.returncode == 2
    assert "  sparseflash train demo --preset ours.toml --import mine\n" in refused.stderr
    assert not (place / "imported").exists()
    assert sparseflash(*preset, "--import", "mine", "--device", "cpu", "--print-config").stdout == printed.stdout


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("nowhere", "", "no module 'nowhere' in"),
        ("nowhere.py", "", "nowhere.py: no such file"),
        ("no/such/mod", "", "name of a module, or the path of a file"),
        ("broken_module", "x = 1\ny = 1 / 0\n", r"ZeroDivisionError: division by zero \(.*broken_module.py, line 2\)"),
        ("broken_module.py", "def f(:\n", "SyntaxError"),
        ("needs_more", "import that_is_not_installed\n", "No module named 'that_is_not_installed'"),
        ("json.py", "", "another module is called 'json'"),
        ("a.b.py", "", "no dot in its name"),
    ],
)
def test_modules_that_cannot_be_imported(name: str, code: str, words: str, place: Path) -> None:
    if code or name in ("json.py", "a.b.py"):
        (place / f"{name.removesuffix('.py')}.py").write_text(code)
    with pytest.raises(ValueError, match=words) as told_of:
        import_modules([name])
    assert name in str(told_of.value)


@pytest.mark.parametrize("names", [["a\x1b[31m"], [""], [3], "mine", ["x" * 300], ["m"] * 17, {"mine": 1}])
def test_names_from_files_are_checked(names: object) -> None:
    with pytest.raises(ValueError, match="imports must be"):
        checked(names)


def test_what_was_imported_already_is_not_asked_for_again() -> None:
    error = UnknownPatternError("no pattern is called 'x' here", ("mine", "ours"))
    assert "--import mine --import ours" in str(told(error, ["mine"], "sparseflash evaluate r"))
    assert told(error, ["mine", "ours"], "sparseflash evaluate r") is error
    meant = ValueError("no pattern is called 'locl' here; did you mean local?")
    assert told(meant, []) is meant
