"""Runs that are killed, interrupted, or out of disk go on as if nothing had been; the long version is `make kills`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparseflash.pathfinder.workers import WorkerError
from sparseflash.train import DataShard, train
from sparseflash.train.checkpoint import load_checkpoint
from tests.train.crash import CONFIG

pytestmark = pytest.mark.tier2

ROOT = Path(__file__).parent.parent.parent
DEATHS = 3


@pytest.fixture(scope="module")
def own_disk() -> str:
    """Why no file system can be mounted here, or nothing."""
    tried = subprocess.run(
        ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, text=True, check=False
    )
    return tried.stderr.strip() if tried.returncode else ""


@pytest.fixture(scope="module")
def told(own_disk: str) -> str:
    """The report of a short campaign."""
    kinds = ["KILL", "INT", "TWO", *([] if own_disk else ["FULL", "READONLY"])]
    command = [
        *([] if own_disk else ["unshare", "-Urm"]),
        sys.executable,
        "-m",
        "tests.train.crash",
        "--deaths",
        str(DEATHS),
        "--by",
        *kinds,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_killed_and_interrupted_runs_lose_nothing_beyond_the_interval(told: str) -> None:
    assert f"{DEATHS} deaths by KILL" in told
    assert f"{DEATHS} deaths by INT" in told


def test_of_two_trainers_the_second_is_refused_and_the_first_loses_nothing(told: str) -> None:
    assert f"{DEATHS} deaths by TWO" in told


def test_full_and_read_only_disks_leave_good_checkpoints(own_disk: str, told: str) -> None:
    if own_disk:
        pytest.skip(f"no file system can be mounted here: {own_disk}")
    assert f"{DEATHS} deaths by FULL" in told
    assert f"{DEATHS} deaths by READONLY" in told


def test_training_goes_on_when_a_worker_is_killed() -> None:
    here, ahead = DataShard(CONFIG), DataShard(CONFIG, workers=1)
    try:
        first = ahead.take(0, 0)
        assert ahead._pool is not None
        (worker,) = ahead._pool._pool._processes
        os.kill(worker, signal.SIGKILL)
        with pytest.warns(UserWarning, match="its work is done again"):
            others = [ahead.take(part, 0) for part in range(1, 5)]
    finally:
        ahead.close()
    for part, batch in enumerate([first, *others]):
        assert torch.equal(batch.inputs, here.take(part, 0).inputs)


def test_training_that_loses_all_its_workers_saves_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(CONFIG, tmp_path / "whole", steps=3, line=lambda text: None)
    take = DataShard.take

    def dies(stream: DataShard, part: int, stage: int) -> object:
        if part == 2 * CONFIG.accumulate:
            raise WorkerError("three times")
        return take(stream, part, stage)

    with monkeypatch.context() as patched:
        patched.setattr(DataShard, "take", dies)
        with pytest.raises(WorkerError, match="three times"):
            train(CONFIG, tmp_path / "run", steps=3, line=lambda text: None)
    assert load_checkpoint(tmp_path / "run").step == 2
    assert train(CONFIG, tmp_path / "run", steps=3, resume=True, line=lambda text: None).losses == whole.losses[2:]
