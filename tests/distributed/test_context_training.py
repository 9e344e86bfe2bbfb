"""Context parallelism beside DDP and FSDP2, and checkpoints that another number of ranks reads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.distributed import training
from tests.distributed.ranks import Ranks


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


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_gradients_are_those_of_one_process(four: Ranks, kind: str) -> None:
    four.run(training.gradients, 2, 2, kind)


def test_gradients_of_a_readout_are_those_of_one_process(four: Ranks) -> None:
    four.run(training.readout_gradients, 2, 2)


@pytest.mark.parametrize(("first", "then"), [("fsdp", "fsdp"), ("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_checkpoint_resumes_on_another_number_of_ranks(
    four: Ranks, two: Ranks, tmp_path: Path, first: str, then: str
) -> None:
    path = tmp_path / "step-3"
    begun = four.run(training.train, 2, 2, first, 0, 3, None, path)
    assert sorted(tmp_path.iterdir()) == [path], "a temporary folder was left"
    resumed = two.run(training.train, 1, 2, then, 3, 6, path, None)
    want = training.alone(6)
    for losses in begun:
        assert losses == pytest.approx(want[:3], rel=1e-9)
    for losses in resumed:
        assert losses == pytest.approx(want[3:], rel=1e-9)


def test_bad_checkpoints_are_refused_on_every_rank(two: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "made"
    two.run(training.train, 1, 2, "ddp", 0, 1, None, path)
    shard = next(path.glob("*.safetensors"))
    state = json.loads((path / "state.json").read_text())
    for what, message in (
        ("exists", "made exists already"),
        ("progress", "numbers and texts, got step=[1]"),
        ("model", "of another model or optimizer: it has model.bias not at all, here it is (4,)"),
    ):
        _expect(two, path, what, message)
    cut = tmp_path / "cut"
    shutil.copytree(path, cut)
    (cut / shard.name).write_bytes(shard.read_bytes()[:-1])
    _expect(two, cut, "load", f"{shard.name} is damaged")
    (cut / shard.name).unlink()
    _expect(two, cut, "load", f"incomplete: it has no {shard.name}")
    (cut / "state.json").write_text(json.dumps(state | {"format": "other"}))
    _expect(two, cut, "load", "foreign or damaged")
    _expect(two, tmp_path / "nowhere", "load", "is not a distributed checkpoint")
    for folder, files, message in (("none", {}, "does not name"), ("pipe", state["files"], "is not a regular file")):
        shutil.copytree(path, tmp_path / folder)
        (tmp_path / folder / "state.json").write_text(json.dumps(state | {"files": files}))
        if folder == "pipe":
            (tmp_path / folder / shard.name).unlink()
            os.mkfifo(tmp_path / folder / shard.name)  # opening it would wait for a writer
        _expect(two, tmp_path / folder, "load", message)
    (tmp_path / "out" / ".new.part").mkdir(parents=True)
    (tmp_path / "out" / ".fresh.part").symlink_to(tmp_path / "out" / ".new.part")
    _expect(two, tmp_path / "out" / "fresh", "exists", "is a link")


def _expect(ranks: Ranks, path: Path, what: str, message: str) -> None:
    for rank, (ok, text) in enumerate(ranks.outcomes(training.refused, path, what)):
        assert not ok, f"rank {rank} went on"
        assert message in text.splitlines()[-1], f"rank {rank}: {text}"
