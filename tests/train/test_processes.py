"""Several processes that train together see what one would."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    train = [sys.executable, "-m", "sparseflash", "train", "path256", "--preset", "path256-cpu", "--layers", "1"]
    train += ["--steps", "2", "--device", "cpu"]
    jobs = [({"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)}, "2", "both") for rank in range(2)]
    processes = [
        subprocess.Popen([*train, "--batch", batch, "--out", tmp_path / out], env=here | extra, stderr=subprocess.PIPE)
        for extra, batch, out in [*jobs, ({}, "4", "one")]
    ]
    for process in processes:
        _, error = process.communicate(timeout=300)
        assert process.returncode == 0, error.decode()
    both, one = (
        [json.loads(line) for line in (tmp_path / out / "steps.jsonl").read_text().splitlines()]
        for out in ("both", "one")
    )
    assert len(both) == 2
    for mine, theirs in zip(both, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
