"""Several processes that train together see what one would, and one goes on where several were killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sparseflash.train.process_groups import Processes

pytestmark = pytest.mark.tier2

TINY = ["--batch", "2", "--layers", "1", "--width", "16", "--heads", "1"]

# A gloo group whose last holder is DDP's reducer deadlocks now and then when it is freed, see docs/several-gpus.md.
WATCHED = """
import gc
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from sparseflash.cli import main

leave = distributed.destroy_process_group

def watched():
    assert not [held for held in gc.get_objects() if type(held) is DistributedDataParallel], "DDP still holds the group"
    leave()

distributed.destroy_process_group = watched
main()
"""


def start(count: int, *arguments: object) -> list[subprocess.Popen[bytes]]:
    """So many processes of ``sparseflash train``, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    line = [sys.executable, "-c", WATCHED, "train", *map(str, arguments), "--device", "cpu"]
    each = [{"WORLD_SIZE": str(count), "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [subprocess.Popen(line, env=here | own, stderr=subprocess.PIPE) for own in each]


def finish(processes: list[subprocess.Popen[bytes]]) -> None:
    errors = []
    for process in processes:
        try:
            errors.append(process.communicate(timeout=300)[1].decode())
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # faulthandler says where it hangs
            errors.append(process.communicate()[1].decode())
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(errors)


def log(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    train = ["path256", "--preset", "path256-cpu", "--layers", 1, "--steps", 2]
    both = start(2, *train, "--batch", 2, "--out", tmp_path / "both")
    one = start(1, *train, "--batch", 4, "--out", tmp_path / "one")
    finish(both + one)
    assert len(log(tmp_path / "both")) == 2
    for mine, theirs in zip(log(tmp_path / "both"), log(tmp_path / "one"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_one_process_goes_on_where_ranks_that_shared_images_were_killed(tmp_path: Path) -> None:
    """In fp32, as people run it; test_shared_training.py compares in float64."""
    killed = tmp_path / "killed"
    ranks = start(2, "demo", *TINY, "--steps", 1000, "--save-every", 1, "--context-parallel", 2, "--out", killed)
    end = time.monotonic() + 120
    while not (killed / "steps.jsonl").exists() or len(log(killed)) < 3:
        assert time.monotonic() < end, "no third step in two minutes"
        assert all(process.poll() is None for process in ranks), [process.communicate() for process in ranks]
        time.sleep(0.02)
    for process in ranks:
        process.kill()
        process.communicate()
    steps = len(log(killed)) + 2
    again = start(1, "demo", "--resume", "--steps", steps, "--out", killed)
    whole = start(1, "demo", *TINY, "--steps", steps, "--out", tmp_path / "whole")
    finish(again + whole)
    assert len(log(killed)) == steps
    for mine, theirs in zip(log(killed), log(tmp_path / "whole"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "1"}, "has RANK but no WORLD_SIZE"),
        ({"WORLD_SIZE": "2"}, "has WORLD_SIZE but no RANK"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "WORLD_SIZE must be a number of at least 1; got '0'"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK must be a number of at least 0; got '-1'"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "got RANK=2 and WORLD_SIZE=2"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but the environment has no MASTER_ADDR"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "no MASTER_PORT"),
    ],
)
def test_half_of_a_launchers_environment_is_refused(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], words: str
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert Processes.here(1) == Processes()
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=words):
        Processes.here(1)
