"""Run `numerics/` in Triton's interpreter.

Triton decides when it is imported whether it interprets or compiles, and the rest of this folder needs the compiler: so
the interpreter gets a process of its own. With a GPU, pytest collects `numerics/` itself and runs the same tests
compiled, bf16 included.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs numerics/ itself")
def test_numerics_in_the_interpreter() -> None:
    numerics = Path(__file__).parent / "numerics"
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(numerics)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=numerics.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert child.returncode == 0, child.stdout + child.stderr
    assert " passed" in child.stdout, child.stdout
