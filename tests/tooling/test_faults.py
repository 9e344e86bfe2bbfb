"""Faults put into kernels and tables on purpose are noticed, every one of them, by laws of this suite."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.faults.catalogue import CPU, NATIVE, TABLE, TRITON

ROOT = Path(__file__).parents[2]


def test_every_fault_is_noticed() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.faults"]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [answer for kind, name, answer in answers if name == "no fault"] == [""] * 4, answers
    assert len(answers) == len(TABLE) + len(CPU) + len(NATIVE) + len(TRITON) + 4
    assert [f"{kind}: {name}" for kind, name, answer in answers if name != "no fault" and not answer] == []
