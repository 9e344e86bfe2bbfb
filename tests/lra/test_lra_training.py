"""Sequence tasks through the same loop and command as Pathfinder."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparseflash.lra import Grammar
from sparseflash.models import SequenceTransformer, SequenceTransformerConfig
from sparseflash.train import DataShard, SequenceStage, TrainConfig, TrainResult, evaluate, held_out, recipe, train
from sparseflash.train.baseline import stage_baseline
from sparseflash.train.sample_batch import model_and_batch
from tests.cli.test_commands import invoke, refused
from tests.lra.test_lra_files import images, papers, reviews

TINY = Grammar(max_depth=2, max_args=3, min_length=3, max_length=6)
SMALL = TrainConfig(
    task="listops",
    model=SequenceTransformerConfig(
        symbols=15, classes=10, pattern="full()", block=(16, 16), width=16, heads=1, layers=1, mlp_width=16,
        readout="first",
    ),
    stages=(
        SequenceStage("listops", 16, grammar=TINY), SequenceStage("listops", 32, grammar=replace(TINY, max_length=8))
    ),
    schedule_steps=4,
    promote_at=0.11,
    batch=4,
    lr=1e-2,
    warmup=2,
    ema=0.9,
)  # fmt: skip


def run(out: Path, steps: int, config: TrainConfig = SMALL, resume: bool = False) -> TrainResult:
    return train(config, out, steps=steps, resume=resume, save_every=100, line=lambda text: None)


def test_a_curriculum_of_trees_resumes_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparseflash.train.curriculum.IMAGES", 8)
    lines: list[str] = []
    whole = train(SMALL, tmp_path / "whole", steps=30, save_every=100, line=lines.append)
    assert whole.progress.stage == 1
    assert "stage 1 of 2: listops, 4 to 5 symbols; the most frequent answer gives" in lines[0]
    losses: list[float] = []
    for steps in (1, whole.progress.since, whole.progress.since + 1, 30):
        part = run(tmp_path / "parts", steps, resume=steps > 1)
        losses += part.losses
    assert losses == whole.losses
    weights = whole.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in part.model.state_dict().items())


def test_workers_and_processes_see_the_same_examples() -> None:
    config = replace(SMALL, batch=4)
    plain, drawn = DataShard(config), DataShard(config, workers=1)
    try:
        for part in range(2):
            one, other = plain.take(part, 0), drawn.take(part, 0)
            assert torch.equal(one.inputs, other.inputs)
            assert torch.equal(one.labels, other.labels)
    finally:
        drawn.close()
    halves = [DataShard(replace(config, batch=2), rank, 2).take(0, 0).inputs for rank in range(2)]
    assert torch.equal(torch.cat(halves), plain.take(0, 0).inputs)


def test_it_learns_two_digits(tmp_path: Path) -> None:
    """MIN, MAX, MED or SM of two digits, from labels: above what the most frequent answer gives within seconds."""
    pairs = Grammar(max_depth=2, max_args=2, min_length=3, max_length=5)
    stage = SequenceStage("listops", 16, grammar=pairs)
    config = replace(
        SMALL, stages=(stage,), batch=64, lr=1e-2, schedule_steps=150, ema=0.0, data="fresh",
        model=replace(SMALL.model, width=32, layers=2, mlp_width=64),
    )  # fmt: skip
    result = run(tmp_path, 150, config)
    score = evaluate(result.model, held_out(stage, 500, batch=250))
    assert score.interval[0] > stage_baseline(stage) + 0.1


@pytest.mark.parametrize(
    ("task", "make", "documents"), [("text", reviews, 1), ("retrieval", papers, 2), ("image", images, 1)]
)
def test_files_train_resume_and_are_examined(
    tmp_path: Path, task: str, make: Callable[[Path], Path], documents: int
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    make(data)
    small = ["--batch", 3, "--layers", 1, "--width", 16, "--heads", 1, "--device", "cpu"]
    first = invoke("train", task, "--folder", data, "--steps", 1, "--out", tmp_path / "run", *small)
    assert first.exit_code == 0, first.output
    assert f"--resume --folder {data} --steps N" in first.stdout
    again = ["--out", tmp_path / "run", "--resume", "--steps", 2, "--device", "cpu"]
    assert "a run may be untrusted, so give their folder by --folder" in refused("train", task, *again)
    second = invoke("train", task, *again, "--folder", data)
    assert second.exit_code == 0, second.output
    whole = invoke("train", task, "--folder", data, "--steps", 2, "--out", tmp_path / "whole", *small)
    assert whole.exit_code == 0, whole.output
    logs = [(tmp_path / name / "steps.jsonl").read_text() for name in ("run", "whole")]
    assert logs[0] == logs[1]
    assert "give their folder by --folder" in refused("evaluate", tmp_path / "run", "--device", "cpu")
    found = json.loads(invoke("evaluate", tmp_path / "run", "--folder", data, "--json", "--device", "cpu").stdout)
    assert found["count"] == {"text": 4, "retrieval": 1, "image": 4}[task]
    assert found["most_frequent_answer"] == {"text": 0.5, "retrieval": 0.5, "image": 0.1}[task]
    assert SequenceTransformer.from_pretrained(found["checkpoint"]).config.documents == documents


def test_missing_files_show_before_anything_is_written(tmp_path: Path) -> None:
    out = ["--out", tmp_path / "run", "--device", "cpu"]
    assert "read from files: name their folder" in refused("train", "text", *out)
    assert "has no folder neg" in refused("train", "text", "--folder", tmp_path, *out)
    assert 'data "fresh" has no end' in refused("train", "text", "--folder", tmp_path, "--data", "fresh", *out)
    assert "pictures are drawn of Pathfinder images" in refused("train", "listops", "--pictures", *out)
    assert "the task listops has no order" in refused("train", "listops", "--order", "morton", *out)
    assert "no pathfinder32 here" in refused("train", "path32", "--folder", tmp_path, *out)
    assert "files of text are split already" in refused("train", "text", "--folder", tmp_path, "--split", "s4", *out)
    assert "name their folder too" in refused("train", "path32", "--level", "easy", *out)
    assert not (tmp_path / "run").exists()


def test_trees_are_written_read_and_examined(tmp_path: Path) -> None:
    made = invoke("generate", "--task", "listops", "--count", 5, "--out", tmp_path / "data", "--workers", 1)
    assert "5 train, 1 val, 1 test trees written" in made.stdout, made.output
    assert "is there already" in refused("generate", "--task", "listops", "--count", 5, "--out", tmp_path / "data")
    options = ["--batch", 1, "--layers", 1, "--width", 16, "--heads", 1, "--device", "cpu", "--steps", 1]
    logs = []
    for name, more in (("drawn", []), ("read", ["--folder", tmp_path / "data"])):
        result = invoke("train", "listops", *options, *more, "--out", tmp_path / name)
        assert result.exit_code == 0, result.output
        logs.append((tmp_path / name / "steps.jsonl").read_text())
    assert "symbols cannot be mirrored" in refused("evaluate", tmp_path / "drawn", "--views", 2, "--device", "cpu")
    found = json.loads(invoke("evaluate", tmp_path / "drawn", "--limit", 1, "--json", "--device", "cpu").stdout)
    again = json.loads(
        invoke("evaluate", tmp_path / "drawn", "--data", tmp_path / "data", "--json", "--device", "cpu").stdout
    )
    assert found["right"] == again["right"]
    assert found["data"] == "listops: listops, 501 to 1,999 symbols"


@pytest.mark.parametrize("preset", ["listops", "listops-short", "text", "retrieval", "image", "demo"])
def test_a_model_and_a_batch_of_every_preset_for_measurements(preset: str) -> None:
    model, batch, stage = model_and_batch(preset, batch=1, layers=1, length=None if preset == "demo" else 128)
    logits = model(batch.inputs, **stage.options).logits
    assert logits.shape == (1, model.config.classes)
    assert batch.labels.shape == (1,)


def test_stages_and_models_must_fit() -> None:
    with pytest.raises(ValueError, match="the task text has 256 symbols, 1 documents an example and 2 classes"):
        replace(SMALL, stages=(SequenceStage("text", 16, "somewhere"),))
    with pytest.raises(ValueError, match="needs a model over symbols"):
        replace(SMALL, model=recipe("path32").model, promote_at=0.9)
    with pytest.raises(ValueError, match="images need a model over pixels"):
        replace(SMALL, stages=recipe("path32").stages)
    with pytest.raises(ValueError, match="cut off at 100"):
        SequenceStage("listops", 100)
    with pytest.raises(ValueError, match="a grammar is for ListOps that is drawn"):
        SequenceStage("listops", 3000, "folder", TINY)
    with pytest.raises(ValueError, match="sequences have no such symmetry"):
        replace(SMALL, augment=True)
    with pytest.raises(ValueError, match="over symbols, not over pixels"):
        _ = SMALL.pixel_stages
    assert TrainConfig.from_dict(json.loads(json.dumps(SMALL.to_dict()))) == SMALL
