"""A run folder that somebody else may have prepared: nothing outside of it is written, and one process trains in it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sparseflash.folder_lock import folder_lock
from sparseflash.train import recipe, train
from sparseflash.train.checkpoint import load_checkpoint

CONFIG = recipe("demo", batch=2, layers=1, width=16, heads=1)


def go_on(run: Path, steps: int = 2) -> None:
    train(CONFIG, run, steps=steps, resume=True, line=lambda text: None)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    train(CONFIG, tmp_path / "run", steps=1, line=lambda text: None)
    return tmp_path / "run"


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "pictures", "best", "steps.jsonl"])
def test_links_in_a_run_folder_are_refused_by_name(run: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    if (run / name).exists():
        (run / name).rename(outside)
    else:
        outside.mkdir()
    before = sorted(outside.rglob("*")) if outside.is_dir() else outside.read_text()
    (run / name).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{name} is a link, to .*outside"):
        go_on(run)
    assert (sorted(outside.rglob("*")) if outside.is_dir() else outside.read_text()) == before


def test_planted_temporary_names_are_not_followed(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (run / ".steps.jsonl.part").symlink_to(outside)
    go_on(run)
    assert outside.read_text() == "mine"


def test_the_second_trainer_is_refused_with_the_first_ones_process(run: Path) -> None:
    with folder_lock(run), pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"):
        go_on(run)
    go_on(run)
    assert not (run / ".lock").exists()


def test_a_renamed_checkpoint_is_noticed(run: Path) -> None:
    folder = run / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / "step-99999999")
    with pytest.raises(ValueError, match="was renamed: it is the checkpoint of step 1"):
        load_checkpoint(folder / "step-99999999")
    with pytest.warns(UserWarning, match="was renamed"):
        go_on(run)
