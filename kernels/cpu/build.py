"""Compile the kernel: ``python kernels/cpu/build.py`` in a checkout, and what installing the package does.

A C++ compiler is all it takes: no headers of torch or Python. It is the one that ``CXX`` names, else ``c++``, ``g++``
or ``clang++``, else that of ziglang from the package index where it is installed, which also compiles for other
machines. Only the standard library is imported: this runs where torch is not.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from .levels import FOLDER, SUFFIXES, Level, levels_of, machine
else:  # by path, before anything is installed
    sys.path.insert(0, str(Path(__file__).parent))
    from levels import FOLDER, SUFFIXES, Level, levels_of, machine

SOURCE = Path(__file__).with_name("kernel.cpp")
STAMP = Path(__file__).with_name("stamp.cpp")
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-unused-function"),
)
# The C library alone: no C++ runtime, no library of the compiler's.
OF_SYSTEM = {
    "linux": ("-ftls-model=initial-exec", "-static-libgcc", "-s", "-Wl,--as-needed", "-Wl,-z,relro,-z,now"),
    "darwin": ("-mmacosx-version-min=11.0",),
}
# Names of targets for ziglang: the oldest C library that wheels of torch have run on.
ZIG = {"linux": "linux-gnu.2.17", "darwin": "macos.11.0", "win32": "windows-gnu"}
# Ziglang's C++ headers would have it compile a whole C++ runtime first. The kernel uses C's part of them alone.
HEADERS = {"cmath": "math.h", "cstdint": "stdint.h", "cstring": "string.h"}


@dataclass(frozen=True)
class Target:
    """What is compiled for.

    Attributes:
        system: as ``sys.platform`` says it.
        family: of processors, by the name that levels have.
    """

    system: str
    family: str

    @property
    def suffix(self) -> str:
        return SUFFIXES.get(self.system, ".so")


def here() -> Target:
    """This machine."""
    return Target(sys.platform, machine())


def compiler(target: Target | None = None) -> list[str] | None:
    """The command of a C++ compiler, or None. For a target that is named it is ziglang's, which knows all of them."""
    if target is None:
        if given := os.environ.get("CXX"):
            return shlex.split(given)
        for name in ("c++", "g++", "clang++"):
            if found := shutil.which(name):
                return [found]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


def digest(level: Level, source: Path = SOURCE) -> str:
    """What a library of a level says of itself, if it was compiled from the sources that lie here as is done here."""
    summed = hashlib.sha256(repr((FLAGS, OF_SYSTEM, level.name, level.flags)).encode())
    for file in sorted([*source.parent.glob("*.h"), *source.parent.glob("*.cpp")]):
        summed.update(f"\n{file.name}\n".encode() + file.read_bytes())
    return f"sparseflash {summed.hexdigest()}"


def current(level: Level, library: Path | None = None) -> bool:
    """Whether a level's library is there, and of these sources."""
    try:
        return digest(level).encode() in (library or level.library).read_bytes()
    except OSError:
        return False


def build(
    levels: Sequence[Level], folder: Path = FOLDER, extra: Sequence[str] = (), source: Path = SOURCE,
    target: Target | None = None,
) -> dict[str, str]:  # fmt: skip
    """Compile levels into a folder. What went wrong, by level; empty where all is well.

    Args:
        levels: from :mod:`levels`.
        folder: where libraries go.
        extra: more flags, as of a sanitizer.
        source: kernel.cpp, or a changed copy beside headers of its own.
        target: None for this machine and any compiler.
    """
    command, machine_there = compiler(target), target or here()
    if command is None:
        what = "ziglang is not installed" if target else "no C++ compiler: set CXX, or install g++, clang++ or ziglang"
        return {level.name: what for level in levels}
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return {level.name: f"no folder for libraries: {error}" for level in levels}

    def compiled(level: Level) -> str:
        into = folder / f"{level.name}{machine_there.suffix}"
        stamp = f'-DSPARSEFLASH_SOURCES="{digest(level, source)}"'
        try:
            # Beside the library, so that it comes into its place whole.
            with tempfile.TemporaryDirectory(prefix=".draft-", dir=folder) as drafts:
                flags = [*_flags(command, level, machine_there, Path(drafts)), *extra, stamp]
                files = ["-o", str(Path(drafts) / into.name), str(source), str(STAMP)]
                subprocess.run([*command, *flags, *files], check=True, capture_output=True, text=True)
                os.replace(Path(drafts) / into.name, into)
        except (OSError, subprocess.CalledProcessError) as error:
            return _told(error)
        return ""

    with ThreadPoolExecutor(max(1, min(len(levels), os.cpu_count() or 1))) as pool:
        return {level.name: why for level, why in zip(levels, pool.map(compiled, levels), strict=True) if why}


def _flags(command: Sequence[str], level: Level, target: Target, drafts: Path) -> list[str]:
    flags = [*FLAGS, *OF_SYSTEM.get(target.system, ()), *level.flags]
    if "ziglang" not in command:
        return flags
    for name, of_c in HEADERS.items():
        (drafts / name).write_text(f"#include <{of_c}>\n")
    unknown = "-static-libgcc", "-mmacosx-version-min=11.0"
    renamed = [flag.replace("=x86-64-v", "=x86_64_v") for flag in flags if flag not in unknown]
    into = "-target", f"{target.family}-{ZIG.get(target.system, target.system)}"
    return [*into, *renamed, "-nostdlib++", "-isystem", str(drafts)]


def _told(error: OSError | subprocess.CalledProcessError) -> str:
    """The line of what a compiler said that names the fault."""
    lines = [line.strip() for line in (getattr(error, "stderr", None) or str(error)).splitlines() if line.strip()]
    faults = [line for line in lines if "error" in line.lower()]
    return (faults or lines or [repr(error)])[0]


def main() -> int:
    """Compile all levels of this machine's family, and say what came of it."""
    levels = levels_of(machine())
    failed = build(levels)
    for level in levels:
        print(f"{level.name}: {failed.get(level.name, level.library)}")
    if not levels:
        print(f"no kernel for {machine()}: attention on the CPU runs in torch")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
