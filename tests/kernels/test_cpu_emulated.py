"""The compiled CPU kernel for processors that are not at hand: cpu_driver.cpp compares it with plain loops.

Debian has what this takes: ``apt-get install g++-aarch64-linux-gnu qemu-user``. Without instructions of its own
(vectors of four floats, as NEON has them) it runs anywhere.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sparseflash.kernels.cpu import build, levels, native

pytestmark = pytest.mark.tier2

ROOT = Path(__file__).parent.parent.parent
DRIVER = Path(__file__).with_name("cpu_driver.cpp")
HOST = build.compiler() or ["no-compiler"]
# Tiles of AMX in plain C, all else as of a processor with AVX-512 and products of bf16.
TILES = "-DSPARSEFLASH_EMULATED_TILES"
BF16 = "-march=x86-64-v4", "-mavx512bf16"
NO_BF16 = "x86-64-v4-bf16" not in [level.name for level in levels.runnable(native.capabilities())]


@pytest.mark.parametrize(
    ("compiler", "flags", "emulator", "panel"),
    [
        (HOST, (), (), 8),
        (HOST, (*BF16, TILES), (), 32),
        (HOST, ("-march=x86-64-v3", "-static"), ("qemu-x86_64", "-cpu", "max"), 16),
        (["aarch64-linux-gnu-g++"], ("-static",), ("qemu-aarch64",), 8),
    ],
    ids=["no instructions of its own", "emulated tiles", "x86-64-v3", "aarch64"],
)
def test_results_are_those_of_plain_loops(
    compiler: list[str], flags: tuple[str, ...], emulator: tuple[str, ...], panel: int, tmp_path: Path
) -> None:
    if "-march=x86-64-v3" in flags and levels.machine() != "x86_64":
        pytest.skip("the compiler here is of another family")
    if TILES in flags and NO_BF16:
        pytest.skip("tiles are emulated on AVX-512 with products of bf16, which this processor has not")
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


LAWS = """
import pathlib, sys, pytest
from sparseflash.kernels.cpu import levels, native
levels.FOLDER = pathlib.Path(sys.argv[1])
assert native.library().name == "x86-64-v4-bf16"
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@pytest.mark.skipif(NO_BF16, reason="tiles are emulated on AVX-512 with products of bf16")
@pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")
def test_emulated_tiles_obey_the_attention_laws(tmp_path: Path) -> None:
    chosen = [level for level in levels.LEVELS if level.name == "x86-64-v4-bf16"]
    assert build.build(chosen, tmp_path, (TILES, "-O2", "-ftls-model=global-dynamic")) == {}
    files = ("tests/laws/test_attention_laws.py", "tests/laws/test_hidden_pairs.py", "tests/laws/test_decode.py")
    command = [sys.executable, "-c", LAWS, str(tmp_path), *files, "-k", "law"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), native.VARIABLE: "x86-64-v4-bf16"}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
