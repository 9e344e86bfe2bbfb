"""Runs and presets of somebody else: what they name outside of their folder is not read, their numbers are bounded."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sparseflash.lra import Grammar
from sparseflash.pathfinder import Geometry, generate
from sparseflash.train import FolderStage, SequenceStage, TrainConfig, load_preset, recipe, train
from sparseflash.train.checkpoint import STATE, _digest, checkpoints, load_checkpoint
from sparseflash.train.preset_text import preset_text
from tests.cli.test_commands import TINY, invoke, refused
from tests.limits import little_memory
from tests.lra.test_lra_files import reviews

CPU = ["--device", "cpu"]
SMALL = recipe("demo", batch=2, layers=1, width=16, heads=1)
# What a stage of files had better not name: the reader's own folders, in every spelling.
Naming = Callable[[Path, Path], str]
OUTSIDE: dict[str, Naming] = {
    "absolute": lambda run, data: str(data),
    "dots": lambda run, data: f"{run}/checkpoints/../../{data.name}",
    "link": lambda run, data: str(_linked(run / "data", data)),
}


def _linked(link: Path, target: Path) -> Path:
    link.symlink_to(target)
    return link


def forged(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the state of a run's checkpoint, and sum it up anew as whoever writes a file can."""
    path = checkpoints(run)[-1] / STATE
    state = json.loads(path.read_text())
    change(state)
    state["sha256"].pop(STATE)
    state["sha256"][STATE] = _digest(state)
    path.write_text(json.dumps(state))


@pytest.fixture(scope="module")
def of_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run, and beside it the files that it was begun with."""
    place = tmp_path_factory.mktemp("of_files")
    reviews(place / "data")
    done = invoke("train", "text", "--folder", place / "data", "--steps", 1, "--out", place / "run", *TINY)
    assert done.exit_code == 0, done.output
    return place


@pytest.mark.parametrize("spelling", OUTSIDE)
def test_files_that_a_run_names_outside_of_itself_are_named_by_the_user_or_not_read(
    of_files: Path, tmp_path: Path, spelling: str
) -> None:
    shutil.copytree(of_files, tmp_path, dirs_exist_ok=True)
    run, data = tmp_path / "run", tmp_path / "data"
    name = OUTSIDE[spelling](run, data)
    forged(run, lambda state: state["config"]["stages"][0].update(folder=name))
    again = ["train", "text", "--out", run, "--resume", "--steps", 2, *CPU]
    for command in (again, ["evaluate", run, *CPU]):
        assert "a run may be untrusted, so give their folder by --folder" in refused(*command)
    done = invoke(*again, "--folder", data)
    assert done.exit_code == 0, done.output


def test_files_inside_of_a_run_go_with_it(of_files: Path, tmp_path: Path) -> None:
    shutil.copytree(of_files / "run", tmp_path / "run")
    shutil.copytree(of_files / "data", tmp_path / "run" / "data")
    forged(tmp_path / "run", lambda state: state["config"]["stages"][0].update(folder=str(tmp_path / "run" / "data")))
    done = invoke("train", "text", "--out", tmp_path / "run", "--resume", "--steps", 2, *CPU)
    assert done.exit_code == 0, done.output
    assert "go on with: sparseflash train text" in done.stdout
    assert "--folder" not in done.stdout


def test_presets_name_nothing_outside_of_their_folder(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    reviews(tmp_path / "data")
    preset = tmp_path / "shared" / "a.toml"
    text = recipe("text", folder=tmp_path / "data", layers=1, width=16, heads=1)
    demo = replace(SMALL, init=str(tmp_path / "weights"))
    for config, words, option in (
        (text, "names files outside of its folder", ["--folder", tmp_path / "data"]),
        (demo, "names weights outside of its folder", ["--init", tmp_path / "weights"]),
    ):
        preset.write_text(preset_text(config, "theirs"))
        command = ["train", config.task, "--preset", preset, "--out", tmp_path / "run", *CPU]
        assert words in refused(*command)
        done = invoke(*command, *option, "--print-config")
        assert done.exit_code == 0, done.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"min_length": 99_999, "max_length": 10**12}, "min_length must be in 0..10,000; got 99999"),
        ({"max_length": 10**12}, "max_length must be in 0..20,000"),
        ({"max_depth": 10**6}, "max_depth must be in 2..100"),
        ({"max_args": 10**9}, "max_args must be in 2..1,000"),
        ({"max_args": 3.5}, "max_args must be in"),
        ({"min_length": True}, "min_length must be in"),
    ],
)
def test_numbers_of_a_grammar_are_bounded(fields: dict[str, Any], words: str) -> None:
    with little_memory(64), pytest.raises(ValueError, match=words):
        Grammar(**fields).draw(0, 0)


def test_a_grammar_whose_trees_are_too_rare_is_given_up() -> None:
    rare = Grammar(max_depth=10, max_args=10, min_length=9_000, max_length=9_002)
    with little_memory(64), pytest.raises(ValueError, match="no tree among 10,000,000 symbols is longer than 9000"):
        rare.draw(0, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": 100_000}, "size must be at most 2,048"),
        ({"num_distractors": 10**9}, "num_distractors must be at most 4,096"),
        ({"contour_length": 10**9}, "contour_length must be at most 256"),
        ({"distractor_length": 10**9}, "distractor_length must be at most 256"),
        ({"paddle_length": 65, "seed_distance": 60}, "paddle_length must be at most 64"),
        ({"paddle_margins": (1,) * 9}, "paddle_margins must be at most 8"),
        ({"paddle_margins": (10**6,)}, "paddle_margins must be at most 64"),
        ({"antialias": 9}, "antialias must be at most 8"),
        ({"paddle_length": 64, "antialias": 8, "size": 2048, "seed_distance": 400}, "is too large: .* cells"),
        ({"paddle_margins": (32,), "size": 2048, "seed_distance": 400, "antialias": 4}, "is too large: .* cells"),
        ({"marker_radius": 1e300}, "marker_radius must be at most 64"),
        ({"paddle_thickness": 1e300}, "paddle_thickness must be at most 64"),
        ({"continuity": 1e300}, "continuity must be at most 1e"),
    ],
)
def test_numbers_of_a_geometry_are_bounded(changes: dict[str, Any], words: str) -> None:
    with little_memory(64), pytest.raises(ValueError, match=words):
        generate(geometry=replace(Geometry.lra(256), **changes), count=1)


def test_what_the_library_itself_makes_is_within_the_bounds() -> None:
    for size in (28, 31, 32, 48, 128, 200, 256, 700, 2048):
        for level in ("easy", "intermediate", "hard"):
            Geometry.sized(size, level)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": 10**9}, "batch must be at most 262,144"),
        ({"accumulate": 10**9}, "accumulate must be at most 262,144"),
        ({"seed": 1 << 70}, "seed must be at most"),
        ({"eval_examples": 10**30}, "eval_examples must be at most"),
        ({"stages": SMALL.stages[:1] * 1001}, "stages must be at most 1,000"),
        ({"batch": 65_536, "stages": (FolderStage("x", 2048),), "dense_weight": 0.0, "model": 0}, "at most 1,073,741"),
        ({"stages": (FolderStage("x", 24),), "dense_weight": 0.0, "model": 1}, "at most 4,294,967,296 weights"),
    ],
)
def test_numbers_of_a_recipe_are_bounded(changes: dict[str, Any], words: str) -> None:
    models = (
        replace(SMALL.pixel_model, dense_classes=0),
        replace(SMALL.pixel_model, dense_classes=0, width=1 << 16, layers=1 << 10),
    )
    if "model" in changes:
        changes = changes | {"model": models[changes["model"]], "data": "fixed"}
    with little_memory(64), pytest.raises(ValueError, match=words):
        replace(SMALL, **changes)


@pytest.mark.parametrize("size", [0, -1, 10**9])
def test_sizes_of_stages_are_bounded(size: int) -> None:
    with pytest.raises(ValueError, match="at most 1,048,576; got"):
        SequenceStage("text", size, "folder")
    with pytest.raises(ValueError, match="a folder's size must be 1 to 2,048 pixels"):
        FolderStage("folder", size)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("cpu_batch = 0", "cpu_batch must be a whole number of at least 1; got 0"),
        ("cpu_batch = -3", "cpu_batch must be"),
        ("cpu_batch = 2.5", "cpu_batch must be"),
        ('cpu_batch = "8"', "cpu_batch must be"),
        ("cpu_batch = 1000000000", "batch must be at most 262,144"),
    ],
)
def test_the_batch_of_a_processor_is_checked(tmp_path: Path, field: str, words: str) -> None:
    (tmp_path / "a.toml").write_text(f"{field}\n{preset_text(SMALL, 'theirs')}")
    with pytest.raises(ValueError, match=f"a.toml is not a preset: {words}"):
        load_preset(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text(f"cpu_batch = 3\n{preset_text(SMALL, 'theirs')}")
    assert load_preset(tmp_path / "a.toml").cpu_batch == 3


def test_numbers_are_refused_wherever_a_run_says_them(tmp_path: Path) -> None:
    train(SMALL, tmp_path / "run", steps=1, line=lambda text: None)

    def geometry(name: str, value: object) -> Callable[[dict[str, Any]], None]:
        return lambda state: state["config"]["stages"][0]["geometry"].update({name: value})

    for change, words in (
        (geometry("size", 100_000), "size must be at most"),
        (geometry("num_distractors", 1e9), "num_distractors must be int"),
        (geometry("num_distractors", 10**9), "num_distractors must be at most"),
        (lambda state: state.update(streams=10**9), "streams 1000000000"),
        (lambda state: state["config"].update(batch=10**9), "batch must be at most"),
    ):
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        forged(tmp_path / "copy", change)
        with little_memory(64), pytest.raises(ValueError, match=words):
            load_checkpoint(tmp_path / "copy")
        shutil.rmtree(tmp_path / "copy")


def test_a_run_that_promises_a_larger_model_than_it_holds(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(SMALL, run, steps=1, line=lambda text: None)
    large = {"width": 4096, "heads": 4, "mlp_width": 8192, "layers": 16}

    def change(state: dict[str, Any]) -> None:
        state["config"]["model"] |= large
        text = json.dumps(state["config"]["model"])
        (checkpoints(run)[-1] / "config.json").write_text(text)
        state["sha256"]["config.json"] = hashlib.sha256(text.encode()).hexdigest()

    forged(run, change)
    config: TrainConfig = load_checkpoint(run).config
    assert config.model.width == 4096
    with little_memory(512), pytest.raises(ValueError, match="are not of the model in its config"):
        train(config, run, steps=2, resume=True, line=lambda text: None)
