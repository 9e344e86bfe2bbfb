"""Which build of the kernel a processor runs: one source, compiled for each level of instructions.

No torch here: the build uses this too, where there is none.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "libraries"
SUFFIXES = {"linux": ".so", "darwin": ".dylib", "win32": ".dll"}
SUFFIX = SUFFIXES.get(sys.platform, ".so")


@dataclass(frozen=True)
class Level:
    """One build.

    Attributes:
        name: of the file, and in the environment variable ``SPARSEFLASH_CPU``.
        machine: as ``platform.machine()`` says it.
        flags: of the compiler.
        needs: what ``torch.cpu.get_capabilities()`` has to name.
        gives: what it makes faster.
        run: whether anybody has run it on such a processor. One that nobody has serves only where it is asked for.
    """

    name: str
    machine: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]
    gives: str
    run: bool = True

    @property
    def library(self) -> Path:
        return FOLDER / f"{self.name}{SUFFIX}"


_V3 = "avx2", "fma3", "f16c", "bmi", "bmi2", "lzcnt"
_V4 = *_V3, "avx512_f", "avx512_bw", "avx512_cd", "avx512_dq", "avx512_vl"
# From the least to the most that a processor may have.
LEVELS = (
    Level("x86-64-v3", "x86_64", ("-march=x86-64-v3",), _V3, "vectors of 8 floats (AVX2)"),
    Level("x86-64-v4", "x86_64", ("-march=x86-64-v4",), _V4, "vectors of 16 floats (AVX-512)"),
    Level(
        "x86-64-v4-bf16",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512bf16"),
        (*_V4, "avx512_bf16"),
        "vectors of 16 floats (AVX-512), products of bf16",
    ),
    Level(
        "x86-64-amx",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (*_V4, "avx512_bf16", "amx_tile", "amx_bf16"),
        "vectors of 16 floats (AVX-512), tiles of bf16 (AMX) in the forward",
        run=False,
    ),
    Level("aarch64", "aarch64", (), (), "vectors of 4 floats (NEON)"),
)
NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


def machine() -> str:
    """The processor's family, by the name that levels have."""
    name = platform.machine().lower()
    return NAMES.get(name, name)


def levels_of(family: str) -> tuple[Level, ...]:
    """The levels of a family of processors, the least first."""
    return tuple(level for level in LEVELS if level.machine == family)


def runnable(capabilities: Mapping[str, object], asked: str = "") -> tuple[Level, ...]:
    """The levels that may serve this machine, the least first.

    Args:
        capabilities: what the processor has.
        asked: the name of one that may serve although nobody has run it yet.
    """
    there = (level for level in levels_of(machine()) if all(capabilities.get(need) for need in level.needs))
    return tuple(level for level in there if level.run or level.name == asked)
