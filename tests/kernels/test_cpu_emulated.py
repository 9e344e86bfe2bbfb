"""The compiled CPU kernel for processors that are not at hand: cpu_driver.cpp compares it with plain loops.

Debian has what this takes: ``apt-get install g++-aarch64-linux-gnu qemu-user``. Without instructions of its own
(vectors of four floats, as NEON has them) it runs anywhere.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from sparseflash.kernels.cpu import build, levels

DRIVER = Path(__file__).with_name("cpu_driver.cpp")
HOST = build.compiler() or ["no-compiler"]


@pytest.mark.parametrize(
    ("compiler", "flags", "emulator", "panel"),
    [
        (HOST, (), (), 8),
        (HOST, ("-march=x86-64-v3", "-static"), ("qemu-x86_64", "-cpu", "max"), 16),
        (["aarch64-linux-gnu-g++"], ("-static",), ("qemu-aarch64",), 8),
    ],
    ids=["no instructions of its own", "x86-64-v3", "aarch64"],
)
def test_results_are_those_of_plain_loops(
    compiler: list[str], flags: tuple[str, ...], emulator: tuple[str, ...], panel: int, tmp_path: Path
) -> None:
    if "-march=x86-64-v3" in flags and levels.machine() != "x86_64":
        pytest.skip("the compiler here is of another family")
    for needed in (compiler[0], *emulator[:1]):
        if shutil.which(needed) is None:
            pytest.skip(f"{needed} is not here (Debian: g++-aarch64-linux-gnu, qemu-user)")
    program = tmp_path / "driver"
    own = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared", "-fno-exceptions")]
    source = ["-O2", f"-I{build.SOURCE.parent}", str(DRIVER), "-o", str(program)]
    done = subprocess.run([*compiler, *own, *flags, *source], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([*emulator, str(program), "60"], capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout == f"60 problems, 0 wrong, panels of {panel}\n", done.stdout + done.stderr
