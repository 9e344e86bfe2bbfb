"""Compile the kernel: ``python kernels/cpu/build.py`` in a checkout, and what installing the package does.

A C++ compiler is all it takes: no headers of torch or Python. It is the one that ``CXX`` names, else ``c++``, ``g++``
or ``clang++``, else that of ziglang where it is installed. Only the standard library is imported: this runs where torch
is not.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING or __package__:
    from sparseflash.kernels.cpu.levels import FOLDER, Level, levels_of, machine
else:  # by path, before anything is installed
    sys.path.insert(0, str(Path(__file__).parent))
    from levels import FOLDER, Level, levels_of, machine

SOURCE = Path(__file__).with_name("kernel.cpp")
FLAGS = (
    *("-O3", "-std=c++17", "-shared", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wall", "-Wextra", "-Wno-unused-function"),
)
# The C library alone: no C++ runtime, no library of the compiler's.
LINUX = "-ftls-model=initial-exec", "-static-libgcc", "-Wl,--as-needed", "-Wl,-z,relro,-z,now"


def compiler() -> list[str] | None:
    """The command of a C++ compiler, or None."""
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    if find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "c++"]
    return None


def build(
    levels: Sequence[Level], folder: Path = FOLDER, extra: Sequence[str] = (), source: Path = SOURCE
) -> dict[str, str]:
    """Compile levels into a folder. What went wrong, by level; empty where all is well.

    Args:
        levels: from :mod:`levels`.
        folder: where libraries go.
        extra: more flags, as of a sanitizer.
        source: kernel.cpp, or a changed copy beside headers of its own.
    """
    command = compiler()
    if command is None:
        return {level.name: "no C++ compiler: set CXX, or install g++ or clang++" for level in levels}
    folder.mkdir(parents=True, exist_ok=True)

    def compiled(level: Level) -> str:
        into = folder / level.library.name
        handle, draft = tempfile.mkstemp(prefix=f".{into.name}.", dir=folder)
        os.close(handle)
        flags = [*FLAGS, *(LINUX if sys.platform == "linux" else ()), *level.flags, *extra]
        try:
            subprocess.run([*command, *flags, "-o", draft, str(source)], check=True, capture_output=True, text=True)
            os.chmod(draft, 0o755)
            os.replace(draft, into)
        except (OSError, subprocess.CalledProcessError) as error:
            Path(draft).unlink(missing_ok=True)
            said = getattr(error, "stderr", None) or str(error)
            return said.strip().splitlines()[0] if said.strip() else repr(error)
        return ""

    with ThreadPoolExecutor(max(1, min(len(levels), os.cpu_count() or 1))) as pool:
        return {level.name: why for level, why in zip(levels, pool.map(compiled, levels), strict=True) if why}


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
