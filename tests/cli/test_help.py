"""What help looks like, what completes, and how messages speak."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from sparseflash.cli import app
from sparseflash.cli.errors import in_options, options, words
from sparseflash.cli.train_options import GROUPS, TrainOptions
from sparseflash.models import PixelTransformerConfig, SequenceTransformerConfig
from sparseflash.train import PRESETS, TASKS, TrainConfig, load_preset, recipe, train

CONFIGS = TrainConfig, PixelTransformerConfig, SequenceTransformerConfig
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]


def shown(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_a_short_form_and_flags_have_no_type(command: str) -> None:
    arguments = [command] if command else []
    text = shown(*arguments, "-h")
    assert text == shown(*arguments, "--help")
    assert "<bool>" not in text
    assert "PosixPath" not in text


def test_version_has_a_short_form() -> None:
    assert shown("-V") == shown("--version")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_examples(command: str) -> None:
    assert f"sparseflash {command}" in shown(command, "--help").split("Examples")[1]


def test_every_option_of_train_is_in_a_group() -> None:
    params = [param for param in COMMANDS["train"].params if param.opts[0].startswith("--")]
    assert {param.rich_help_panel for param in params} == set(GROUPS)
    text = shown("train", "--help")
    places = [text.index(f"─ {title} ─") for title in GROUPS]
    assert places == sorted(places)


# Fields of a recipe that presets alone set, so that a new field is either an option of train or named here.
OF_PRESETS = {
    *("task", "model", "stages", "promote_at", "review", "augment", "final_lr", "warmup", "weight_decay", "clip"),
    *("unit", "tile", "tied", "mlp_width", "classes", "dense_classes", "wavelengths", "grey_levels", "lit_above"),
    *("readout_reach", "symbols", "documents", "readout", "rotary_base"),
}
# What is typed as text or as a path is taken apart by the command; the rest has the type of the field that it sets.
TYPED = {"first_stage": str, "init": Path, "block": str, "pattern": str, "imports": list[str]}


def test_options_of_train_are_fields_of_the_recipe() -> None:
    types = {field.name: get_type_hints(config)[field.name] for config in CONFIGS for field in fields(config)}
    given = get_type_hints(TrainOptions)
    of_recipe = given.keys() & types.keys() - {"task"}
    assert types.keys() - of_recipe == OF_PRESETS
    for name in sorted(of_recipe):
        assert given[name] == TYPED.get(name, types[name]) | None, name
    beside = {name for function in (train, recipe) for name in inspect.signature(function).parameters}
    assert given.keys() - of_recipe - {"list_presets", "print_config"} <= beside


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str) -> None:
    for option in ("--install-completion", "--show-completion"):
        assert option in shown("--help")
    asked = {"_SPARSEFLASH_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": "sparseflash train --sch"}
    asked |= {"COMP_WORDS": "sparseflash train --sch", "COMP_CWORD": "2", "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "import sys; sys.argv[0] = 'sparseflash'; from sparseflash.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | asked, capture_output=True, text=True, check=False, timeout=60
    )
    assert "--schedule-steps" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["trian"], "'train'"),
        (["train", "--presett", "x"], "--preset"),
        (["show", "x", "--seq-leng", "3"], "--seq-len"),
    ],
)
def test_the_meant_command_or_option_is_named(arguments: list[str], meant: str) -> None:
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    assert result.exit_code == 2
    assert meant in result.stderr


def test_presets_are_listed_by_task() -> None:
    text = shown("train", "--list-presets")
    for name in PRESETS:
        assert f"  {name} " in text
        assert load_preset(name).summary.split(",")[0] in text
    assert [line.strip() for line in text.splitlines() if line.strip() in TASKS and line[0] != " "] == list(TASKS)


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ("steps must be at least 1; got 0", "--steps must be at least 1; got 0"),
        ("save_every must be at least 1", "--save-every must be at least 1"),
        ("width / heads must be even; got width=30", "--width / --heads must be even; got --width 30"),
        ("got dense_weight=1.0 and dense_classes=0", "got --dense-weight 1.0 and dense_classes=0"),
        ("mine.toml is not a preset: lr must be positive", "mine.toml is not a preset: lr must be positive"),
        ("runs/batch must be a folder", "runs/batch must be a folder"),
        ("no file data/save_every/steps.jsonl", "no file data/save_every/steps.jsonl"),
        ("a stage's tokens must be one of all", "a stage's tokens must be one of all"),
        ("two heads see 'save_every'", "two heads see 'save_every'"),
        ("activation_checkpointing must be bool", "--save-memory must be bool"),
        ("data must be one of fixed, fresh", "--draw must be one of fixed, fresh"),
        ("imports must be names", "--import must be names"),
        ("task must be one of demo", "TASK must be one of demo"),
    ],
)  # fmt: skip
def test_messages_name_what_the_user_typed(message: str, said: str) -> None:
    from sparseflash.cli.app import train

    assert in_options(message, options(train)) == said


def test_messages_of_the_system_name_the_file_that_people_know() -> None:
    full = OSError(28, "No space left on device", Path(f"runs/.step-00000010.{'0a' * 8}/.model.safetensors.{'b1' * 8}"))
    assert words(full) == "No space left on device: runs/step-00000010/model.safetensors"
    assert words(FileNotFoundError("no folder x")) == "no folder x"
    moved = OSError(13, "Permission denied", f"a/.sample_0.png.{'0' * 16}", None, "a/sample_0.png")
    assert words(moved) == "Permission denied: a/sample_0.png"
    # Names of the user's own are shown whole.
    assert words(OSError(13, "Permission denied", "a/.notes.1/.b.tmp")) == "Permission denied: a/.notes.1/.b.tmp"
