"""Training on Pathfinder images in files: the release's layout, its splits, and the same files in another place."""

import json
import shutil
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sparseflash import pathfinder
from sparseflash.models import PixelTransformerConfig
from sparseflash.train import (
    DataShard,
    FolderStage,
    SequenceStage,
    Stage,
    TrainConfig,
    TrainResult,
    held_out,
    recipe,
    train,
)
from sparseflash.train.baseline import KNOWN, stage_baseline
from sparseflash.train.batch import turned
from sparseflash.train.checkpoint import load_checkpoint
from sparseflash.train.data import draw, planned
from tests.train.test_training import quiet

COUNT = 30
HARD = "curv_contour_length_14"
MODEL = PixelTransformerConfig(pattern="local(64)", block=(64, 64), width=16, heads=1, layers=1, mlp_width=16)


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the real one is: a copy inside a copy, metadata as text, one image without a byte; another size beside."""
    out = tmp_path_factory.mktemp("archive")
    inner = out / "lra_release" / "lra_release"
    pathfinder.write(inner, 32, COUNT + 1, seed=3, progress=False)
    pathfinder.write(inner, 32, 12, level="easy", seed=3, progress=False)
    shutil.copytree(inner / "pathfinder32", inner / "pathfinder64")
    shutil.copytree(inner / "pathfinder32", out / "lra_release" / "pathfinder32")
    (inner / "pathfinder32" / HARD / "imgs" / "0" / "sample_7.png").write_bytes(b"")
    return out


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    shutil.copytree(release, tmp_path / "copy")
    return tmp_path / "copy"


def noted(stage: FolderStage) -> FolderStage:
    with pytest.warns(UserWarning, match="dropped 1 empty"):
        return stage.noted()


def config_of(folder: Path, **changes: object) -> TrainConfig:
    stage = FolderStage(str(folder), 32)
    config = TrainConfig("path32", MODEL, (stage,), 40, batch=4, lr=1e-2, warmup=2, augment=True)
    return replace(config, **changes)  # type: ignore[arg-type]


def run(config: TrainConfig, out: Path, steps: int, resume: bool = False, workers: int = 0) -> TrainResult:
    with pytest.warns(UserWarning, match="dropped 1 empty"):
        return train(config, out, steps=steps, resume=resume, workers=workers, line=quiet)


@pytest.mark.parametrize("split", ["s4", "contiguous"])
def test_the_sets_are_those_of_the_split(release: Path, split: str) -> None:
    stage = noted(FolderStage(str(release), 32, split=split))
    with pytest.warns(UserWarning, match="dropped 1"):
        parts = pathfinder.read(release, size=32).split(split)
    assert {name: len(indices) for name, indices in stage.splits.items()} == {"train": 24, "val": 3, "test": 3}
    for name, part in parts._asdict().items():
        batch = draw(stage, 0, stage.splits[name])
        assert (batch.inputs.numpy() == np.stack([part[i][0] for i in range(len(part))])).all()
        assert batch.labels.tolist() == part.labels.tolist()
    images, labels = next(held_out(stage, split="val"))
    assert labels.tolist() == parts.val.labels.tolist()
    assert images.shape == (3, 32, 32)
    assert stage.examples == COUNT


def test_training_goes_round_the_training_part_turned_at_random(release: Path) -> None:
    config = replace(config_of(release, batch=8), stages=(noted(FolderStage(str(release), 32)),))
    seen = np.concatenate([planned(config, part, 0)[2] for part in range(3)])
    assert sorted(seen) == list(range(24))
    stage, seed, indices, dense, symmetries = planned(config, 0, 0)
    assert symmetries is not None
    plain = draw(stage, seed, indices, dense).inputs.numpy()
    assert (draw(stage, seed, indices, dense, symmetries).inputs.numpy() == turned(plain, symmetries)).all()


def test_workers_read_the_same_images(release: Path) -> None:
    config = config_of(release)
    here, ahead = DataShard(config), DataShard(config, workers=1)
    try:
        for turn in range(3):
            assert torch.equal(here.take(turn, 0).inputs, ahead.take(turn, 0).inputs)
    finally:
        ahead.close()


def test_a_run_goes_on_with_its_files_elsewhere_and_with_no_others(copy: Path, tmp_path: Path) -> None:
    config = config_of(copy, eval_every=2)
    whole = run(config, tmp_path / "whole", 4)
    first = run(config, tmp_path / "parts", 2)
    moved = copy.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"no folder .*copy"):
        train(config, tmp_path / "parts", steps=4, resume=True, line=quiet)
    its_own = load_checkpoint(tmp_path / "parts").config
    second = run(its_own.moved(moved), tmp_path / "parts", 4, resume=True)
    assert first.losses + second.losses == whole.losses
    assert second.progress == whole.progress
    image = moved / "lra_release" / "lra_release" / "pathfinder32" / HARD / "imgs" / "0" / "sample_3.png"
    image.write_bytes(image.with_name("sample_4.png").read_bytes())
    for given, words in (
        (its_own.moved(moved), "does not hold the files that the run began with: as many, but not the same"),
        (config_of(moved, eval_every=2), "made with another stages"),
    ):
        with pytest.raises(ValueError, match=words), pytest.warns(UserWarning, match="dropped"):
            train(given, tmp_path / "parts", steps=5, resume=True, line=quiet)
    image.write_bytes(b"")
    with (
        pytest.raises(ValueError, match="began with: 29 examples, not 30"),
        pytest.warns(UserWarning, match="dropped 2"),
    ):
        train(its_own.moved(moved), tmp_path / "parts", steps=5, resume=True, line=quiet)


def test_files_that_change_while_they_are_read_are_noticed(copy: Path) -> None:
    stage = noted(FolderStage(str(copy), 32))
    before = draw(stage, 0, range(2))
    metadata = copy / "lra_release" / "lra_release" / "pathfinder32" / HARD / "metadata" / "0.npy"
    metadata.write_text("".join(metadata.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="29 examples, not 30"):
        draw(stage, 0, range(2))
    changed = replace(stage, examples=0, digest="")
    assert not torch.equal(draw(changed, 0, range(2)).inputs, before.inputs)


def test_workers_are_not_told_of_empty_images_again(release: Path) -> None:
    stage = noted(FolderStage(str(release), 32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(draw(stage, 0, range(2)).labels) == 2


def test_the_recipe_of_a_task_takes_a_folder(release: Path) -> None:
    config = recipe("path32", folder=release)
    assert config.stages == (FolderStage(str(release), 32),)
    assert config.stages[0].options == {"tokens": None}
    assert recipe("demo", folder=release, dense_weight=0.0).data == "fixed"  # of drawn images it is fresh ones
    easy = recipe("path32", folder=release, level="easy").stages[0]
    assert isinstance(easy, FolderStage)
    assert (easy.level, easy.split) == ("curv_baseline", "contiguous")
    inside = release / "lra_release" / "lra_release" / "pathfinder32" / "curv_baseline"
    assert recipe("path32", folder=inside).stages[0].noted() == replace(
        easy, folder=str(inside), examples=12, digest=pathfinder.read(inside).digest()
    )
    lit = recipe("path256", preset="path256-lit", folder=release).stages[0]
    assert isinstance(lit, FolderStage)
    assert (lit.size, lit.tokens) == (256, recipe("path256", preset="path256-lit").stages[-1].options["tokens"])
    assert recipe("path32", folder=release, split="contiguous").stages[0] != config.stages[0]
    again = TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert not config.differences(again)


def test_rules_of_thumb(release: Path, tmp_path: Path) -> None:
    assert stage_baseline(FolderStage(str(release), 32)) == KNOWN[32, "hard"]
    unknown = release / "lra_release" / "lra_release" / "pathfinder32" / "curv_baseline"
    shutil.copytree(unknown, tmp_path / "pathfinder32" / "curv_mine")
    stage = FolderStage(str(tmp_path / "pathfinder32"), 32, level="curv_mine", split="contiguous")
    assert "the distance" in stage.rule  # its generator is known
    (tmp_path / "pathfinder32" / "curv_mine" / "generator.json").unlink()
    assert (stage.rule, stage_baseline(stage)) == ("guessing", 0.5)


def test_a_run_of_before_files_were_noted_goes_on_where_it_was(tmp_path: Path) -> None:
    old = recipe("text", folder=tmp_path).to_dict()
    for fields in old["stages"]:
        del fields["examples"], fields["digest"]
    for name in ("eval_every", "eval_examples", "patience"):
        del old[name]
    found = TrainConfig.from_dict(json.loads(json.dumps(old)))
    (stage,) = found.stages
    assert isinstance(stage, SequenceStage)
    now = replace(found, stages=(replace(stage, examples=3, digest="ab"),))
    assert not now.differences(found)
    assert found.moved(tmp_path) == found
    with pytest.raises(ValueError, match="did not note which files it was begun with"):
        found.moved(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="are drawn, it has no folder"):
        recipe("demo").moved(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"split": "tfds"}, "split must be s4 or contiguous; got 'tfds'"),
        ({"level": "easy"}, "the s4 split is of the hard level alone.*contiguous"),
        ({"tokens": "some"}, "tokens must be one of"),
    ],
)
def test_bad_stages_are_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FolderStage("somewhere", 32, **changes)  # type: ignore[arg-type]


def test_what_files_cannot_give_is_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a dense loss needs the curves of images that are drawn"):
        config_of(release, dense_weight=1.0, model=replace(MODEL, dense_classes=3))
    with pytest.raises(ValueError, match='"fresh" has no end'):
        config_of(release, data="fresh")
    with pytest.raises(ValueError, match=r"31 of 31 images damaged, truncated or not 64 pixels"):
        FolderStage(str(release), 64).noted()
    pathfinder.write(tmp_path, 32, 1, progress=False)
    with pytest.raises(ValueError, match="too few to split"):
        FolderStage(str(tmp_path), 32, split="contiguous").noted()
    pathfinder.write(tmp_path, 32, 4, progress=False)
    with pytest.raises(ValueError, match=r"there are no validation examples of .*: leave eval_every out"):
        train(config_of(tmp_path, eval_every=1), tmp_path / "run", steps=1, line=quiet)
    assert not (tmp_path / "run").exists()


def test_mistakes_are_drawn_and_attention_is_not(release: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="dropped"):
        train(config_of(release), tmp_path, steps=1, pictures=True, line=quiet)
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["step-00000001-mistakes.png"]


def test_stages_look_alike() -> None:
    for stage in (Stage(pathfinder.Geometry.lra(32)), FolderStage("somewhere", 32)):
        assert (stage.size, stage.tokens_each, stage.drawn) == (32, 1024, isinstance(stage, Stage))
    assert set(asdict(FolderStage("somewhere", 32))) == {
        "folder", "size", "level", "split", "tokens", "examples", "digest"
    }  # fmt: skip
