"""What others wrote reaches a terminal as text: no control character, no markup, and names whole."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseflash import pathfinder
from sparseflash.lra import open_corpus
from sparseflash.models import PixelTransformerConfig
from sparseflash.patterns.progress import track
from sparseflash.patterns.shown import shown, shown_lines
from sparseflash.train import FolderStage, TrainConfig, load_preset, recipe, train
from sparseflash.train.logs import Reporter
from sparseflash.train.preset_text import preset_text
from sparseflash.utils.untrusted import archive_in
from tests.cli.test_commands import TINY, invoke
from tests.lra.test_lra_files import reviews
from tests.train.test_foreign_runs import forged

pytestmark = pytest.mark.tier2

CPU = ["--device", "cpu"]
# It clears the screen, names the window, turns the text around, ends the line, and looks like rich's markup.
EVIL = "a\x1b[2J\x1b]0;mine\x07\x9b1m\u202egnp.\r[bold]b[/]"
SPELLED = r"a\x1b[2J\x1b]0;mine\x07\x9b1m\u202egnp.\r[bold]b[/]"
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """The text, which must be fit for a terminal."""
    assert not CONTROL.search(text), repr(text)
    return text


def told(*arguments: object) -> str:
    """All that a command prints, which must be fit for a terminal; no traceback."""
    result = invoke(*arguments)
    assert result.exit_code in (0, 2), result.output
    return clean(result.stdout + result.stderr)


@given(st.text())
def test_text_is_shown_without_control_characters(text: str) -> None:
    assert "\n" not in clean(shown(text))
    clean(shown_lines(text).replace("\t", ""))
    assert shown(shown(text)) == shown(text)
    assert shown_lines(text).count("\n") == text.count("\n")


def test_plain_text_of_any_language_is_shown_as_it_is() -> None:
    for text in ("Größe 3 µm – 日本語 ✓ 👍", "runs/a [1] (b).png"):
        assert shown(text) == shown_lines(text) == text


@pytest.fixture
def release(tmp_path: Path) -> Path:
    pathfinder.write(tmp_path / "data", 32, 3, progress=False)
    return tmp_path / "data"


def rename_image(release: Path, name: str, content: bytes | None) -> None:
    level = release / "pathfinder32" / "curv_contour_length_14"
    table = level / "metadata" / "0.npy"
    rows = [line.split() for line in table.read_text().splitlines()]
    rows[1][1] = name
    np.save(table, np.array(rows))  # as the original generator: any character may be in a name
    if content is not None:
        (level / "imgs" / "0" / name).write_bytes(content)


NAME = EVIL.replace("/", "-").replace("\\", "-").replace(":", "-")


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG"], ids=["missing", "empty", "damaged"])
def test_names_of_images(release: Path, content: bytes | None) -> None:
    rename_image(release, NAME, content)
    if content == b"":
        with pytest.warns(UserWarning, match="dropped 1 empty") as warned:
            pathfinder.read(release)
        words = str(warned[0].message)
    else:
        with pytest.raises((ValueError, OSError)) as caught:
            pathfinder.read(release)
        words = str(caught.value)
    assert shown(NAME) in clean(words)
    output = told("train", "path32", "--folder", release, "--steps", 1, "--out", release / "run", *TINY)
    assert shown(NAME) in output


@pytest.mark.filterwarnings("ignore:.*not the published")
def test_names_of_reviews_and_archives_and_folders(tmp_path: Path) -> None:
    place = reviews(tmp_path) / "aclImdb" / "train" / "neg"
    (place / f"3_{NAME}.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="is empty") as caught:
        open_corpus("text", tmp_path)
    assert shown(NAME) in clean(str(caught.value))
    (tmp_path / "empty").mkdir()
    archive = f"{NAME};touch x #.tar.gz"
    (tmp_path / "empty" / archive).write_bytes(b"")
    command = archive_in(tmp_path / "empty")
    assert command is not None
    assert clean(command).startswith("tar xzf '")
    assert command.endswith(";touch x #.tar.gz'"), "a name is one word for the shell"
    (tmp_path / "empty" / archive).unlink()
    shutil.move(tmp_path / "aclImdb", tmp_path / "empty" / NAME)
    assert shown(NAME) in told("train", "text", "--folder", tmp_path / "empty", *CPU)


def test_configs_of_runs(tmp_path: Path) -> None:
    config = recipe("demo", batch=2, layers=1, width=16, heads=1)
    train(config, tmp_path / "run", steps=1, line=lambda text: None)
    again = ["train", "demo", "--resume", "--out", tmp_path / "run", "--steps", 2, *CPU]
    for number, (field, change) in enumerate((
        ("task", {"task": EVIL}),
        ("data", {"data": EVIL}),
        (EVIL, {EVIL: 1}),
        ("precision", {"precision": EVIL}),
        ("init", {"init": EVIL}),
    )):  # fmt: skip
        run = tmp_path / f"run{number}"
        shutil.copytree(tmp_path / "run", run)
        forged(run, lambda state, change=change: state["config"].update(change))  # type: ignore[misc]
        for command in ([*again[:4], run, *again[5:]], ["evaluate", run, *CPU]):
            output = told(*command)
        assert "error" in output or field in ("task", "init")


def test_what_a_config_says_of_itself(tmp_path: Path) -> None:
    stage = FolderStage(EVIL, 32, level=f"curv_{EVIL}", split="contiguous")
    assert SPELLED in clean(str(stage))
    for make in (
        lambda: PixelTransformerConfig.from_json(json.dumps({EVIL: 1})),
        lambda: PixelTransformerConfig.from_json(json.dumps({"pattern": EVIL})),
        lambda: PixelTransformerConfig.from_json(json.dumps({"order": EVIL})),
        lambda: TrainConfig.from_dict({EVIL: 1, "model": {}, "stages": []}),
        lambda: TrainConfig.from_dict(recipe("demo").to_dict() | {EVIL: 1}),
    ):
        with pytest.raises(ValueError, match=r"\\x1b") as caught:
            make()
        clean(str(caught.value))
    preset = tmp_path / "a.toml"
    for text in (f"{json.dumps(EVIL)} = 1\n", f"cpu_batch = {json.dumps(EVIL)}\n", f"summary = {json.dumps(EVIL)}\n"):
        body = preset_text(recipe("demo"), "theirs")
        preset.write_text(text + (body.replace('summary = "theirs"\n', "") if text.startswith("summary") else body))
        output = told("train", "demo", "--preset", preset, *CPU, "--print-config")
        assert "error" in output or "summary" in text


def test_a_printed_recipe_is_the_same_and_fit_for_a_terminal(tmp_path: Path) -> None:
    config = recipe("demo", init=EVIL + "\x7f\x85 é 日本")
    text = clean(preset_text(config, EVIL))
    assert "é 日本" in text
    assert tomllib.loads(text)["summary"] == EVIL
    (tmp_path / "again.toml").write_text(text)
    assert load_preset(tmp_path / "again.toml").config == config


def test_a_lock_and_a_stage_speak_plainly(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / ".lock").write_text(f"{EVIL} {EVIL}")
    with (tmp_path / ".lock").open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert SPELLED.split("\\r")[0] in told("train", "demo", "--out", tmp_path, "--steps", 1, *TINY)
    lines: list[str] = []
    with Reporter(tmp_path / "run", 0, 1, line=lines.append) as reporter:
        reporter.stage(0, EVIL, "a rule", lambda: 0.5, None)
    assert lines == [f"{SPELLED}; a rule gives 50.0%"]


def test_names_that_are_no_text_end_in_words(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(str(tmp_path)) + b"/caf\xe9[red]\x1b[1m")
    for command in (
        ["evaluate", name, *CPU],
        ["train", "text", "--folder", name, *CPU],
        ["train", "demo", "--out", name, "--resume", *CPU],
        ["train", "demo", "--preset", f"{name}.toml", *CPU],
    ):
        assert r"caf\udce9[red]\x1b[1m" in told(*command)


LONG = "[bold]" + "name" * 45 + "[/bold][/]"


@pytest.mark.parametrize("columns", ["20", "80"])
def test_names_are_shown_whole_and_are_no_markup(tmp_path: Path, columns: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.chdir(tmp_path)
    long = LONG.replace("/", "|")
    for command in (
        ["show", "local(3)", "--seq-len", 64, "--out", f"{long}.png", "--html", f"{long}.html"],
        ["show", "local(3)", "--seq-len", 64, "--out", f"nowhere/{long}.png"],
        ["generate", "--size", 32, "--count", 1, "--workers", 1, "--out", long],
        ["generate", "--task", "listops", "--count", 1, "--workers", 1, "--out", f"trees{long}"],
        ["train", "demo", "--steps", 1, "--out", f"run{long}", *TINY],
        ["evaluate", f"run{long}", "--limit", 1, *CPU],
        ["evaluate", long, *CPU],
        ["train", "demo", "--preset", f"{long}.toml", *CPU],
        ["train", "demo", "--import", f"{long}.py", *CPU],
    ):
        assert long in told(*command)


def test_a_bar_over_a_file_shows_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("COLUMNS", "160")
    assert list(track(range(3), "reading a[bold]b[/bold][/]\x1b[2J", after_s=-1)) == [0, 1, 2]
    assert r"reading a[bold]b[/bold][/]\x1b[2J" in stream.getvalue()
