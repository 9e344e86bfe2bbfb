"""The attention laws once more, on the Triton kernels in Triton's interpreter.

Triton decides when it is imported whether it interprets, so this takes a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_triton_kernels_obey_the_attention_laws() -> None:
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "SPARSEFLASH_TEST_BACKEND": "triton",
        "SPARSEFLASH_EXAMPLES": os.environ.get("SPARSEFLASH_INTERPRETER_EXAMPLES", "4"),
    }
    files = ("tests/test_attention_laws.py", "tests/test_hidden_pairs.py", "tests/test_heavy_lines.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
