"""Presets: every file is a recipe, and a bad one is refused in plain words."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sparseflash.pathfinder import Geometry, marker_distance_baseline
from sparseflash.train import PRESETS, TASKS, TrainConfig, load_preset, recipe, train
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.tasks import FOLDER

LAST = {"path32": 32, "path64": 64, "pathx": 128, "path256": 256}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_recipe_that_ends_at_its_task(name: str) -> None:
    config = load_preset(name).config
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if config.task in LAST:
        last = config.pixel_stages[-1]
        assert (last.geometry, last.match_distance) == (Geometry.lra(LAST[config.task]), False)
        assert config.dense_weight == 0
        assert config.data == "fixed"
        assert all(stage.baseline is not None for stage in config.stages)
        lengths = [stage.geometry.contour_length for stage in config.pixel_stages]
        assert lengths == sorted(lengths)


def test_baselines_in_the_files_are_what_is_measured() -> None:
    for stage in load_preset("path256-cpu").config.pixel_stages[:5:2]:
        found = marker_distance_baseline(geometry=stage.geometry, match_distance=stage.match_distance, pairs=1000)
        assert found == pytest.approx(stage_baseline(stage), abs=0.05)


def test_every_task_has_a_preset_of_its_name() -> None:
    assert set(TASKS) <= set(PRESETS)
    assert {load_preset(name).config.task for name in PRESETS} == set(TASKS)


def test_recipes_by_name() -> None:
    assert recipe("path256", pattern="local(512) | butterfly(unit=256)").batch == 1
    assert recipe("path256", pattern="local(512)").pixel_model.unit == "pixel"
    assert recipe("path256", device="cuda").batch > 1
    assert (recipe("path256").precision, recipe("path256", device="cuda").precision) == ("fp32", "bf16")
    assert recipe("path256", preset="path256-lit").pixel_model.tokens == "lit_tiles"
    assert recipe("demo", dense_weight=0.0).pixel_model.dense_classes == 0
    assert recipe("path32", dense_weight=0.5).pixel_model.dense_classes == 3
    assert recipe("path32", layers=2).model.layers == 2
    with pytest.raises(ValueError, match=r"task must be one of .*; got 'path512'"):
        recipe("path512")
    with pytest.raises(ValueError, match="is for the task path256; got 'pathx'"):
        recipe("pathx", preset="path256-lit")


def test_a_preset_of_your_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text((FOLDER / "path32.toml").read_text().replace("layers = 8", "layers = 3"))
    assert load_preset(file).config == replace(
        load_preset("path32").config, model=replace(load_preset("path32").config.model, layers=3)
    )
    with pytest.raises(FileNotFoundError, match="no file"):
        load_preset(tmp_path / "other.toml")
    with pytest.raises(ValueError, match=r"preset must be one of .*path256-lit"):
        load_preset("path257")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('task = "path32"', 'task = "path33"', "task must be one of"),
        ("length = 2", "lenght = 2", "no field 'lenght'"),
        ("size = 32\nlength = 2", "length = 2", "'size'"),
        ("[model]", "[model", "is not a preset"),
        ("width = 64", "width = 30", "multiple of 4"),
        ("lr = 0.001", "learning_rate = 0.001", "learning_rate"),
        ("base = 32", "base = 33", "got base 33"),
    ],
)
def test_bad_presets_are_refused(tmp_path: Path, old: str, new: str, words: str) -> None:
    text = (FOLDER / "path32.toml").read_text()
    assert old in text
    (tmp_path / "bad.toml").write_text(text.replace(old, new, 1))
    with pytest.raises(ValueError, match=words):
        load_preset(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": float("nan")}, "lr must be a positive number; got nan"),
        ({"batch": 0}, "batch must be at least 1; got 0"),
        ({"precision": "fp8"}, "fp32, bf16; got 'fp8'"),
        ({"pattern": "local(-1)"}, "local"),
        ({"width": 33}, "multiple of 4"),
    ],
)
def test_bad_changes_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        recipe("demo", **changes)  # type: ignore[arg-type]


def test_configs_that_are_none_are_refused() -> None:
    with pytest.raises(ValueError, match="not a training config"):
        TrainConfig.from_dict({"task": "demo"})


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"text", "retrieval", "image"}))
def test_every_preset_takes_a_step_stops_by_its_minutes_and_goes_on(name: str, tmp_path: Path) -> None:
    """A tiny model through everything else that the preset says, at its precision on a GPU."""
    config = load_preset(name).config
    heads = 1 if config.task == "listops" else config.model.heads
    small = replace(config.model, layers=2, heads=heads, width=8 * heads, mlp_width=8)
    config = replace(config, model=small, batch=1)
    first = train(config, tmp_path, minutes=1e-9, line=lambda text: None)
    assert (first.step, first.out_of_time, first.progress.stage) == (1, True, 0)
    second = train(config, tmp_path, minutes=1e-9, resume=True, line=lambda text: None)
    assert (second.step, second.out_of_time) == (2, True)


@pytest.mark.parametrize(
    "name",
    [
        "path32",
        "path64",
        "pathx",
        "pathx-lit",
        "pathx-cpu",
        "path256-lit",
        "path256-cpu",
        "path256-pixels",
        "path256-last",
        "pathx-pixels",
        "pathx-last",
    ],
)
def test_the_last_stage_of_a_preset_takes_a_step(name: str, tmp_path: Path) -> None:
    config = load_preset(name).config
    small = replace(config.pixel_model, layers=1, heads=1, width=8, mlp_width=8)
    config = replace(config, model=small, batch=1, accumulate=1, first_stage=len(config.stages) - 1)
    result = train(config, tmp_path, steps=1, line=lambda text: None)
    assert result.progress.stage == len(config.stages) - 1
    assert config.pixel_stages[-1].geometry == Geometry.lra(LAST[config.task])
