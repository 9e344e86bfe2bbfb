"""The comparison of steps and the runs of benchmarks/path256.py, tiny, on a CPU."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import all_pixels, path256, record
from sparseflash.models import PixelTransformer
from sparseflash.train import load_preset, recipe
from sparseflash.train.data import draw
from sparseflash.train.losses import loss_of


def test_every_contender_takes_a_step_and_the_figures_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    sizes = ["--side", "48", "--layers", "1", "--batch", "1", "--runs", "1"]
    path256.main(["compare", "path256", *sizes, "--device", "cpu"])
    (file,) = tmp_path.glob("*/*-path256-compare-path256.json")
    found = json.loads(file.read_text())
    rows = {row["attention"]: row for row in found["rows"]}
    assert found["runs"] == 1
    assert rows["dense"]["density"] == 1.0
    assert rows["butterfly"]["density"] < rows["tiles, 5 x 3 of 8 x 16"]["density"] < 1
    tokens = [rows[name]["tokens_an_image"] for name in ("dense", "lit tiles, 5 x 5 of 8 x 8", "lit pixels, 16 around")]
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == 48 * 48
    for row in rows.values():
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        assert 0 <= row["attention_share"] < 1


def test_dense_contenders_compute_the_same() -> None:
    config = load_preset("path256").config
    config = replace(config, precision="fp32", model=replace(config.model, layers=1))
    images = draw(replace(config.pixel_stages[0], match_distance=False), 0, range(1))
    losses = {}
    for contender in path256.contenders(config.pixel_model):
        if contender.name.startswith("dense"):
            step = path256.Step(contender, config, images, torch.device("cpu"))
            for layer in step.model.layers:
                layer.attend = contender.attend  # type: ignore[assignment]
            losses[contender.name] = float(loss_of(step.model, images, config, config.stages[0])[0].detach())
    assert losses["dense"] == pytest.approx(losses["dense, torch SDPA"], rel=1e-5)


def test_a_run_goes_on_by_the_same_line_and_is_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path / "results")
    line = ["run", "demo", "--minutes", "1e-9", "--out", str(tmp_path / "run"), "--device", "cpu"]
    for steps, more in ((1, []), (2, ["--test", "4"])):
        path256.main([*line, *more])
        (file,) = (tmp_path / "results").glob("*/*-path256-run-demo.json")
        (row,) = json.loads(file.read_text())["rows"]
        assert (row["steps"], row["images"]) == (steps, 8 * steps)
    assert row["count"] == 4
    assert row["accuracy"] == row["right"] / 4
    assert 0.4 < row["marker_distance_baseline"] < 0.6
    assert "accuracy" in capsys.readouterr().out


def test_answers_over_all_pixels_are_added_up_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    monkeypatch.setattr(all_pixels, "CHUNK", 2)
    monkeypatch.setattr(all_pixels, "COARSE", {"everything": {"pattern": "local(1)"}})
    for count in (2, 3):
        all_pixels.main(["pathx", "--count", str(count), "--masks", "coarse", "--device", "cpu"])
        (file,) = tmp_path.glob("*/*-path256-all-pixels-pathx-coarse.json")
        own, blind = json.loads(file.read_text())["rows"]
        assert (own["count"], own["agree"], len(own["seconds"])) == (count, count, count)
        assert own["right"] == own["lit_pixels_right"] == blind["lit_pixels_right"]
        assert own["largest_difference"] < 1e-5 < blind["largest_difference"]
        assert own["accuracy"] == own["right"] / count
        assert own["tokens"] == 128 * 128
        assert blind["density"] < own["density"] < 0.2
    model = PixelTransformer.from_pretrained(record.ROOT / "benchmarks" / "weights" / "pathx")
    all_pixels.over(model, {"blind": {"pattern": "local(1)"}})["blind"].save_pretrained(tmp_path / "run")
    runs = f"everything={tmp_path / 'run'}"
    all_pixels.main(["pathx", "--count", "3", "--masks", "trained", "--runs", runs, "--device", "cpu"])
    (file,) = tmp_path.glob("*/*-path256-all-pixels-pathx-trained.json")
    (trained,) = json.loads(file.read_text())["rows"]
    assert {**trained, "seconds": 0} == {**blind, "seconds": 0} | {
        name: trained[name] for name in ("seconds_median", "seconds_quartiles")
    }


def test_the_preset_of_small_canvases_grows_by_a_dash_a_stage() -> None:
    config = recipe("path32", preset=record.ROOT / "benchmarks" / "small-canvases.toml", tokens="all")
    assert config.pixel_model.key_gate
    assert [(stage.size, stage.geometry.contour_length) for stage in config.pixel_stages] == [(24, 2), (28, 3), (32, 4)]
