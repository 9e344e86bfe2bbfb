"""`sparseflash train` on ranks that share each image's tokens takes the steps of one process, whoever goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from sparseflash.models import PixelTransformer
from sparseflash.models.files import read_tensors
from sparseflash.train.checkpoint import checkpoints
from tests.distributed import trainer
from tests.distributed.ranks import Ranks
from tests.distributed.trainer import CONFIG, LADDER

pytestmark = pytest.mark.tier2


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("context", [2, 4])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_of_the_loss_are_those_of_one_process(four: Ranks, context: int, kind: str) -> None:
    four.run(trainer.gradients, context, kind)


def test_losses_are_those_of_one_process(four: Ranks, two: Ranks, tmp_path: Path) -> None:
    want, _ = trainer.run(CONFIG, tmp_path / "one", 4, 1)
    for ranks, context in ((two, 2), (four, 4)):
        for losses, _ in ranks.run(trainer.run, CONFIG, tmp_path / str(context), 4, context):
            assert losses == pytest.approx(want, rel=1e-9)
    # Two groups of two ranks, of two images each, see the four images of one process.
    labels = replace(CONFIG, dense_weight=0.0, model=replace(trainer.MODEL, dense_classes=0))
    want, _ = trainer.run(replace(labels, batch=4), tmp_path / "four images", 4, 1)
    for losses, _ in four.run(trainer.run, labels, tmp_path / "groups", 4, 2):
        assert losses == pytest.approx(want, rel=1e-9)


def test_evaluations_are_those_of_one_process(four: Ranks, tmp_path: Path) -> None:
    """Of three batches for four ranks: one has none."""
    config = replace(CONFIG, eval_every=2, eval_examples=5)
    trainer.run(config, tmp_path / "one", 4, 1)
    four.run(trainer.run, config, tmp_path / "four", 4, 4)
    evaluations = []
    for name in ("one", "four"):
        lines = [json.loads(line) for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()]
        evaluations.append([line for line in lines if "validation_accuracy" in line])
        assert len(checkpoints(tmp_path / name / "best")) == 1
    assert evaluations[0] == evaluations[1]
    assert [line["validation_examples"] for line in evaluations[0]] == [5, 5]


def test_another_number_of_ranks_goes_on(four: Ranks, two: Ranks, tmp_path: Path) -> None:
    """Through a promotion, with reviews, averaged weights and recomputed activations."""
    steps = 8
    whole = four.run(trainer.run, LADDER, tmp_path / "whole", steps, 2)
    assert all(each == whole[0] for each in whole)
    losses, stage = whole[0]
    assert stage == 1
    parts, found = tmp_path / "parts", list[float]()
    shutil.copytree(tmp_path / "whole", parts)
    for lost in checkpoints(parts)[1:]:
        shutil.rmtree(lost)  # as if all had been killed in the second step
    for ranks, context, until in ((two, 2, 3), (two, 1, 5), (None, 1, 6), (four, 4, 7), (four, 1, 8)):
        arguments = LADDER, parts, until, context, True
        each = [trainer.run(*arguments)] if ranks is None else ranks.run(trainer.run, *arguments)
        assert all(one == each[0] for one in each)
        found += each[0][0]
    assert found == pytest.approx(losses[1:], rel=1e-9)
    for name in ("model.safetensors", "optimizer.safetensors"):
        want, got = (read_tensors(checkpoints(tmp_path / run)[-1] / name) for run in ("whole", "parts"))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "context", "words"),
    [
        ({}, 3, "context_parallel=3 ranks share each image, but 4 processes do not divide into groups of 3"),
        ({}, 0, "context_parallel must be at least 1; got 0"),
        ({"block": (256, 256)}, 4, "576 tokens are 3 cells of 256, which 4 ranks cannot share"),
        ({"tokens": "lit_pixels", "pattern": "full()"}, 2, 'tokens "lit_pixels" cannot be shared out among ranks'),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_is_refused_on_every_rank(
    four: Ranks, tmp_path: Path, changes: dict[str, Any], context: int, words: str
) -> None:
    config = replace(CONFIG, model=replace(CONFIG.model, **changes))
    _refused(four, words, config, tmp_path / "run", 1, context)
    assert not (tmp_path / "run").exists()


def test_batches_that_the_groups_cannot_share_evenly_are_refused(four: Ranks, two: Ranks, tmp_path: Path) -> None:
    out = tmp_path / "run"
    two.run(trainer.run, CONFIG, out, 1, 1)
    _refused(four, "this run's steps have 2 batches, which 4 groups of processes cannot share", CONFIG, out, 2, 1, True)
    assert [path.name for path in checkpoints(out)] == ["step-00000001"]
    assert len(four.run(trainer.run, CONFIG, out, 2, 2, True)[0][0]) == 1


def test_tables_made_on_the_device_are_refused_by_the_model() -> None:
    words, images = "what each layer's BlockMask says; got a NoneType", torch.zeros(1, 24, 24, dtype=torch.uint8)
    with pytest.raises(ValueError, match=words):
        PixelTransformer(trainer.MODEL)(images, masks=[None, None], mesh=cast(DeviceMesh, object()))


def _refused(ranks: Ranks, words: str, *arguments: object) -> None:
    for rank, (ok, text) in enumerate(ranks.outcomes(trainer.run, *arguments)):
        assert not ok, f"rank {rank} went on"
        assert words in text.splitlines()[-1], f"rank {rank}: {text}"
