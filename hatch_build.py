"""Compiles the kernel of attention on a CPU while the package is installed or a wheel is built.

Attention runs without it too, in torch, so a machine without a compiler is no error: one line says so. What is wanted
can be said in the environment:

- ``SPARSEFLASH_BUILD``: ``auto`` (compile if that can be done), ``require`` (else fail), ``none`` (the pure wheel).
- ``SPARSEFLASH_TARGET``: a wheel for a machine of this name (``TARGETS``), compiled by ziglang, whatever is here.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

MODES = "auto", "require", "none"
TARGETS = {
    "linux-x86_64": ("linux", "x86_64"),
    "linux-aarch64": ("linux", "aarch64"),
    "macos-arm64": ("darwin", "aarch64"),
}
ROOT = Path(__file__).parent
FOLDER = ROOT / "sparseflash" / "kernels" / "cpu"
ZIGLANG = "ziglang>=0.13"


def kernel(module: str) -> Any:
    """A module of kernels/cpu that needs no torch; the package that it is in does."""
    name = "_sparseflash_kernel"
    if name not in sys.modules:
        sys.modules[name] = ModuleType(name)
        sys.modules[name].__path__ = [str(FOLDER)]
    return importlib.import_module(f"{name}.{module}")


def pip_gives(requirement: str) -> bool:
    """Whether pip finds it: to ask for what is not to be had would fail an installation that needs no compiler."""
    # Where pip runs a build, this variable hides what is installed, and so pip itself.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    name = requirement.partition(">")[0]
    command = [
        sys.executable,
        "-m",
        "pip",
        "index",
        "versions",
        name,
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    try:
        asked = subprocess.run(command, env=environment, capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0


def platform_tag(target: Any, libraries: Sequence[Path]) -> str:
    """The systems that load these libraries, as names of wheels say it."""
    if target.system == "linux":
        glibc = [kernel("elf").needs(library).glibc for library in libraries]
        if None in glibc:
            return f"linux_{target.family}"  # of another C library than GNU's
        major, minor = max([(2, 17), *glibc])
        return f"manylinux_{major}_{minor}_{target.family}"
    if target.system == "darwin":
        return f"macosx_11_0_{'arm64' if target.family == 'aarch64' else target.family}"
    return f"win_{ {'x86_64': 'amd64', 'aarch64': 'arm64'}[target.family] }"


class Kernel(BuildHookInterface[Any]):
    """The hook of wheels, editable ones too."""

    def dependencies(self) -> list[str]:
        """Ziglang, where nothing else compiles."""
        mode, target = self._wanted()
        if mode == "none" or not kernel("levels").levels_of(target.family):
            return []
        if os.environ.get("SPARSEFLASH_TARGET"):
            return [ZIGLANG]
        return [ZIGLANG] if kernel("build").compiler() is None and pip_gives(ZIGLANG) else []

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile what is not there, and let the wheel carry it."""
        mode, target = self._wanted()
        if mode == "none":
            return
        build, levels = kernel("build"), kernel("levels").levels_of(target.family)
        foreign = bool(os.environ.get("SPARSEFLASH_TARGET"))
        folder = ROOT / "build" / "libraries" / os.environ["SPARSEFLASH_TARGET"] if foreign else FOLDER / "libraries"
        libraries = {level: folder / f"{level.name}{target.suffix}" for level in levels}
        missing = [level for level, library in libraries.items() if not build.current(level, library)]
        failed = build.build(missing, folder, target=target if foreign else None) if missing else {}
        built = [library for level, library in libraries.items() if level.name not in failed]
        if len(built) < len(levels) or not levels:
            self._tell(mode, failed, target, bool(built))
        if built and version == "standard":
            build_data["tag"] = f"py3-none-{platform_tag(target, built)}"
            build_data["pure_python"] = False
            for library in built:
                build_data["force_include"][str(library)] = f"sparseflash/kernels/cpu/libraries/{library.name}"

    def _wanted(self) -> tuple[str, Any]:
        """The mode, and what is compiled for."""
        mode, name = os.environ.get("SPARSEFLASH_BUILD") or "auto", os.environ.get("SPARSEFLASH_TARGET")
        if mode not in MODES:
            raise ValueError(f"SPARSEFLASH_BUILD must be one of {', '.join(MODES)}; got {mode!r}")
        if not name:
            return mode, kernel("build").here()
        if name not in TARGETS:
            raise ValueError(f"SPARSEFLASH_TARGET must be one of {', '.join(TARGETS)}; got {name!r}")
        return "require" if mode == "auto" else mode, kernel("build").Target(*TARGETS[name])

    def _tell(self, mode: str, failed: dict[str, str], target: Any, some: bool) -> None:
        why = "; ".join(dict.fromkeys(failed.values())) or f"there is none for {target.family}"
        which = f"{', '.join(failed)} of the CPU kernel" if some else "the CPU kernel"
        line = f"sparseflash: {which} was not compiled ({why})"
        if mode == "require":
            raise RuntimeError(line)
        effect = "a lesser one serves" if some else "attention on a CPU runs in torch, as right and slower"
        self.app.display_warning(f"{line}: {effect}; `sparseflash doctor` says what to do")
