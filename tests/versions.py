"""The parts of the suite that meet torch and Triton, on each version of them that is supported.

    python -m tests.versions                  # every pair, each in a virtual environment of its own under .venvs
    python -m tests.versions --only 2.11.0    # one of them
    python -m tests.versions --only 2.11.0 --tests tests/test_operators.py

Needs nothing installed. CI runs the suite on the versions of constraints.txt, the newest pair; this is for the others.
From the package index torch for Linux comes with CUDA: several GB for a version, which run without a GPU too.
A version that cannot be had here is said to be so, with pip's own words, and is no failure; a test that fails is.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Versions:
    """What goes together."""

    torch: str
    triton: str  # the one that this torch asks for
    numpy: str  # that its interpreter works with


SUPPORTED = (
    Versions("2.11.0", "3.6.0", "numpy<2.4"),  # 3.6's interpreter fails with numpy 2.4: "only 0-dimensional arrays"
    Versions("2.12.0", "3.7.0", "numpy"),
    Versions("2.13.0", "3.7.1", "numpy"),
)
TESTS = (
    "tests/kernels", "tests/distributed", "tests/integrations", "tests/laws", "tests/test_attention_features.py",
    "tests/test_cpu_kernel.py", "tests/test_dropout.py", "tests/test_flex.py", "tests/test_modules.py",
    "tests/test_operators.py", "tests/test_routing.py", "tests/train",
)  # fmt: skip
PINNED = ("torch", "triton", "numpy", "setuptools")  # by `Versions` or by torch, not by constraints.txt
TELL = "import torch, triton, numpy; print(torch.__version__, triton.__version__, numpy.__version__)"


def python(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def installed(versions: Versions, folder: Path) -> str | None:
    """Make the environment unless it is there; what pip said if it could not."""
    if (folder / "ready").exists():
        return None
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    wanted = [f"torch=={versions.torch}", f"triton=={versions.triton}", versions.numpy]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join([line for line in lines if line.split("==")[0] not in PINNED] + wanted[:2]) + "\n")
        constraints.flush()
        pip = [str(python(folder)), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        pip += ["-c", constraints.name, *wanted, "-e", ".[dev]"]
        environment = os.environ | {"PIP_CONSTRAINT": constraints.name}
        done = subprocess.run(pip, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        return (re.findall(r"ERROR: (.*)", done.stderr) or done.stderr.strip().splitlines() or ["no reason given"])[0]
    (folder / "ready").touch()
    return None


def exercised(versions: Versions, folder: Path, tests: list[str]) -> tuple[bool, str]:
    """Whether the tests pass there, and what pytest said at its end."""
    found = subprocess.check_output([str(python(folder)), "-c", TELL], text=True).split()
    for name, wanted, got in zip(("torch", "triton"), (versions.torch, versions.triton), found, strict=False):
        if got.split("+")[0] != wanted:
            return False, f"{name} is {got} in {folder}, not {wanted}: remove the folder"
    print(f"torch {found[0]}, triton {found[1]}, numpy {found[2]}", flush=True)
    run = [str(python(folder)), "-m", "pytest", "-n", "2", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    lines = []
    with subprocess.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.strip())
    return process.returncode == 0, next((line for line in reversed(lines) if line), "pytest said nothing")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=[v.torch for v in SUPPORTED], nargs="+", help="versions of torch; default all"
    )
    parser.add_argument("--tests", nargs="+", default=list(TESTS), help="what pytest gets; default what meets torch")
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venvs", help="where environments are kept")
    given = parser.parse_args(arguments)
    told, failed = [], False
    for versions in SUPPORTED:
        if given.only and versions.torch not in given.only:
            continue
        name = f"torch {versions.torch}, triton {versions.triton}"
        folder = given.venvs.resolve() / f"torch-{versions.torch}"
        if (reason := installed(versions, folder)) is not None:
            told.append(f"{name}: could not be had here ({reason})")
            continue
        passed, last = exercised(versions, folder, given.tests)
        failed |= not passed
        told.append(f"{name}: {'passed' if passed else 'FAILED'} ({last})")
    print("\n".join(told))
    sys.exit(failed)


if __name__ == "__main__":
    main()
