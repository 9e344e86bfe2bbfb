"""``--print-config``: the recipe as a preset that gives the same recipe again."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from sparseflash.cli import app
from sparseflash.train import PRESETS, load_preset, recipe
from sparseflash.train.preset_text import preset_text


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_printed_is_itself(name: str, tmp_path: Path) -> None:
    preset = load_preset(name)
    (tmp_path / "again.toml").write_text(preset_text(preset.config, preset.summary))
    again = load_preset(tmp_path / "again.toml")
    assert (again.config, again.summary) == (preset.config, preset.summary)


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.floats(1e-12, 1e6), st.integers(0, 1 << 40))
def test_values_survive_the_text(init: str, lr: float, seed: int) -> None:
    config = recipe("demo", lr=lr, seed=seed, init=init, imports=("a", "b/c.py"), block=(32, 64))
    fields = tomllib.loads(preset_text(config, init))
    assert (fields["lr"], fields["seed"], fields["init"], fields["summary"]) == (lr, seed, init, init)
    assert fields["patterns"] == {"import": ["a", "b/c.py"]}
    assert fields["model"]["block"] == [32, 64]


def test_what_the_command_prints_is_what_it_would_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ["--pattern", "local(512) | butterfly(unit=256)", "--layers", "1", "--lr", "3e-3", "--device", "cpu"]
    result = CliRunner().invoke(app, ["train", "path256", *asked, "--print-config"])
    assert result.exit_code == 0, result.output
    assert not list(tmp_path.iterdir())
    Path("mine.toml").write_text(result.stdout)
    wanted = recipe("path256", pattern="local(512) | butterfly(unit=256)", layers=1, lr=3e-3)
    assert recipe("path256", preset="mine.toml") == dataclasses.replace(wanted, precision="fp32")
    again = CliRunner().invoke(app, ["train", "path256", "--preset", "mine.toml", "--device", "cpu", "--print-config"])
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("[patterns]\nimport", "[patterns]\nimports", "has no field 'imports'"),
        ('import = ["mine"]', 'import = "mine"', "imports must be"),
        ('[patterns]\nimport = ["mine"]', "[[patterns]]", "is a table"),
        ("padding = 1", "", "padding"),
        ("size = 24", "size = true", "size must be int"),
    ],
)
def test_bad_presets_are_refused(old: str, new: str, words: str, tmp_path: Path) -> None:
    text = preset_text(recipe("demo", imports=("mine",)), "ours")
    assert text.count(old) == 1
    (tmp_path / "bad.toml").write_text(text.replace(old, new))
    with pytest.raises(ValueError, match=words):
        load_preset(tmp_path / "bad.toml")
