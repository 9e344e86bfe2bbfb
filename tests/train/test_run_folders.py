"""A run folder that somebody else may have prepared: nothing outside of it is written, and one process trains in it."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from sparseflash.models import PixelTransformer
from sparseflash.tools import demo
from sparseflash.train import recipe, train
from sparseflash.train.checkpoint import load_checkpoint
from sparseflash.train.figures import draw_answers
from sparseflash.train.logs import Reporter
from sparseflash.train.validation import keep_best
from sparseflash.utils.folder_lock import folder_lock
from tests.limits import little_memory

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


def test_what_kills_left_is_removed_and_nothing_that_it_links_to(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "mine.txt").write_text("mine")
    folder = run / "checkpoints"
    (folder / ".step-evil").symlink_to(outside)
    (folder / ".step-gone").symlink_to(tmp_path / "nowhere")
    (folder / ".step-file").write_text("left")
    (folder / ".step-00000001.removed").mkdir()
    (folder / ".step-00000001.removed" / "link").symlink_to(outside)
    for number in range(os.getpid() - 3, os.getpid() + 3):  # the names that checkpoints once had until they were whole
        (folder / f".step-00000002.{number}").symlink_to(outside)
    go_on(run)
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000001", "step-00000002"]
    assert [path.name for path in sorted(outside.rglob("*"))] == ["deep", "mine.txt"]
    assert (outside / "deep" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["step-00000000", "step-00000003"])
def test_a_checkpoint_that_is_a_link_is_refused_by_name(run: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(run / "checkpoints" / "step-00000001", tmp_path / "theirs")
    (run / "checkpoints" / name).symlink_to(tmp_path / "theirs")
    for use in (lambda: go_on(run), lambda: load_checkpoint(run)):
        with pytest.raises(ValueError, match=f"{name} is a link, to .*theirs"):
            use()
    assert sorted(path.name for path in (tmp_path / "theirs").iterdir()) == [
        "config.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip


def test_files_of_a_checkpoint_do_not_lead_out_of_it(run: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "optimizer.safetensors", "state.json"):
        shutil.copytree(run, tmp_path / name)
        file = tmp_path / name / "checkpoints" / "step-00000001" / name
        file.rename(tmp_path / "outside")
        file.symlink_to(tmp_path / "outside")
        with pytest.raises(ValueError, match=r"leads out of .*step-00000001|is foreign or damaged"):
            load_checkpoint(tmp_path / name)
        (tmp_path / "outside").unlink()


def test_best_checkpoints_are_kept_and_removed_without_following_links(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    kept = keep_best(run, run / "checkpoints" / "step-00000001")
    (kept.parent / ".step-evil").symlink_to(outside)
    shutil.rmtree(kept)
    kept.symlink_to(outside)
    with pytest.raises(ValueError, match="step-00000001 is a link"):
        load_checkpoint(run / "best")
    keep_best(run, run / "checkpoints" / "step-00000001")
    assert load_checkpoint(run / "best").step == 1
    assert [path.name for path in kept.parent.iterdir()] == ["step-00000001"]
    assert [path.name for path in outside.iterdir()] == ["mine.txt"]


def test_pictures_are_not_written_through_links(run: Path, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    outside = tmp_path / "outside.png"
    outside.write_text("mine")
    (run / "pictures").mkdir()
    (run / "pictures" / "step-00000001-mistakes.png").symlink_to(outside)
    with Reporter(run, 1, 2, line=lambda text: None) as reporter:
        reporter.figure("mistakes", Figure(), 1)
    assert outside.read_text() == "mine"
    assert (run / "pictures" / "step-00000001-mistakes.png").read_bytes().startswith(b"\x89PNG")


HOSTILE_LOGS = {
    "deep": (b"[" * 60_000 + b"\n", "line 3: JSON that is nested too deeply"),
    "deeper": (b'{"a":' * 10_000_000 + b"\n", "line 3: longer than 65,536 bytes"),
    "bytes": (b"\xff\xfe\n", "line 3: no text"),
    "list": (b"[1]\n", "line 3: no object with the number of a step"),
    "step": (b'{"step": "1"}\n', "line 3: no object with the number of a step"),
    "nan": (b'{"step": NaN}\n', "line 3: no object"),
    "long": (b'{"step": ' + b"1" * 5000 + b"}\n", "line 3: Exceeds the limit"),
    "newlines": (b"\n" * 60_000_000, "line 3: Expecting value"),
    "endless": (b"x" * 40_000_000, "line 3: longer than 65,536 bytes"),
}


@pytest.mark.parametrize("kind", HOSTILE_LOGS)
def test_a_log_that_is_none_is_refused_with_its_line_and_left_as_it_was(run: Path, kind: str) -> None:
    content, words = HOSTILE_LOGS[kind]
    log = run / "steps.jsonl"
    before = log.read_bytes()
    log.write_bytes(before + b'{"step": 1, "validation_accuracy": 0.5}\n' + content)
    with little_memory(192), pytest.raises(ValueError, match=rf"steps.jsonl, {words}.*move the file away"):
        go_on(run)
    assert log.stat().st_size == len(before) + 40 + len(content)
    log.unlink()
    go_on(run)


@pytest.mark.parametrize("end", [b"", b'{"step": 2, "lo', b"\0" * 300, b'{"step": 1}'])
def test_a_line_that_a_kill_left_half_written_is_dropped(run: Path, end: bytes) -> None:
    log = run / "steps.jsonl"
    before = log.read_bytes()
    log.write_bytes(before + end)
    go_on(run)
    lines = log.read_bytes().splitlines()
    whole = [b'{"step": 1}'] if end.endswith(b"}") else []
    assert lines[:-1] == [*before.splitlines(), *whole]
    assert json.loads(lines[-1])["step"] == 2


def test_a_sparse_log_is_not_read_and_one_of_too_many_lines_is_given_up(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = run / "steps.jsonl"
    os.truncate(log, 8 << 30)
    with little_memory(64), pytest.raises(ValueError, match=r"steps.jsonl has 8,589,934,592 bytes; at most"):
        go_on(run)
    log.write_bytes(b'{"step": 1}\n' * 101)
    monkeypatch.setattr("sparseflash.train.logs.MOST_LINES", 100)
    with pytest.raises(ValueError, match=r"steps.jsonl has more than 100 lines"):
        go_on(run)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_a_log_that_is_no_file_is_refused_and_nothing_waits(run: Path, kind: str) -> None:
    log = run / "steps.jsonl"
    log.unlink()
    if kind == "pipe":
        os.mkfifo(log)
    elif kind == "folder":
        log.mkdir()
    else:
        log.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"steps.jsonl is (not a regular file|a link)"):
        go_on(run)


@pytest.mark.tier2
def test_a_demo_replaces_links_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in ("_mask", "_exactness", "_speed", "_learning", "_long"):
        monkeypatch.setattr(demo, part, lambda *_: None)
    outside, out = tmp_path / "outside", tmp_path / "out"
    (outside / "run").mkdir(parents=True)
    (outside / "run" / "mine.txt").write_text("mine")
    out.mkdir()
    (out / demo.MARK).symlink_to(outside / "run" / "mine.txt")
    (out / "run").symlink_to(outside / "run")
    demo.run(out)
    assert (outside / "run" / "mine.txt").read_text() == "mine"
    assert not (out / "run").is_symlink()
    assert not (out / demo.MARK).is_symlink()


def test_pictures_of_answers_replace_links(run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / "a.png").symlink_to(outside)
    model = PixelTransformer.from_pretrained(run / "checkpoints" / "step-00000001")
    draw_answers(model, CONFIG.pixel_stages[0], tmp_path / "a.png", count=2)
    assert outside.read_text() == "mine"
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_another_process_has_just_ended_is_not_begun_anew(
    run: Path, tmp_path: Path, begun: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may end between the look for a run and the moment in which the folder is held."""
    out = tmp_path / "out"
    if begun:
        out.mkdir()

    def late(folder: Path) -> AbstractContextManager[None]:
        shutil.copytree(run, folder, dirs_exist_ok=True)
        return folder_lock(folder)

    monkeypatch.setattr("sparseflash.train.loop.folder_lock", late)
    before = (run / "steps.jsonl").read_bytes()
    with pytest.raises(ValueError, match="already holds a run: resume it"):
        train(CONFIG, out, steps=1, resume="auto", line=lambda text: None)
    assert (out / "steps.jsonl").read_bytes() == before
