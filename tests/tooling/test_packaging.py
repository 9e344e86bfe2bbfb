"""sdist -> wheel carries the folders that are reached through links; both install and import far from the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

from sparseflash.kernels.cpu import elf, levels, native

ROOT = Path(__file__).parents[2]
EXTRAS = {"dev", "diffusers", "docs", "plot", "train", "transformers"}

# Run by the Python of an environment that has the package and its dependencies, and neither this folder nor the
# optional packages in reach.
PROBE = """
import importlib, pkgutil, sys
sys.modules["diffusers"] = sys.modules["transformers"] = sys.modules["peft"] = None  # as if they were not there
import sparseflash
print(sparseflash.__file__)
for module in pkgutil.walk_packages(sparseflash.__path__, "sparseflash."):
    if not module.name.endswith(("__main__", ".ops")):  # the latter warns
        importlib.import_module(module.name)
import torch
import sparseflash.kernels.cpu  # a folder without __init__.py, through a link in the checkout
from sparseflash.kernels.cpu import native
from sparseflash.kernels.launch import COMMITTED  # a file beside the module
assert COMMITTED.usual
print(native.library().name if native.library() else native.missing())
print(sparseflash.tools.doctor.examine().backends["cpu"].works)
q = torch.randn(1, 2, 40, 16)
print(tuple(sparseflash.attention(q, q, q, sparseflash.parse("causal() & local(9)")).shape))
try:
    sparseflash.integrations.transformers.register()
except ImportError as error:
    print(error)
"""
RUN_HERE = [level.name for level in levels.runnable(native.capabilities())]
# As slow as it is quick to compile.
COMPILER = """#!/bin/sh
exec c++ "$@" -O0
"""


@dataclass(frozen=True)
class Built:
    """What is shipped."""

    sdist: Path
    pure: Path  # the wheel for any machine, built from the sdist
    platform: Path  # the wheel for this one, with the CPU kernel


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("dist")
    make = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run(make, SPARSEFLASH_BUILD="none")
    (pure,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    run([*make, "--wheel"], SPARSEFLASH_BUILD="require")  # of this checkout, where the libraries are already
    (platform,) = set(folder.glob("*.whl")) - {pure}
    return Built(sdist, pure, platform)


def run(command: list[str], cwd: Path | None = None, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SPARSEFLASH")} | environment
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=kept)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_links_are_tracked_links() -> None:
    for name in ("patterns", "kernels"):
        link = ROOT / "sparseflash" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_sdist_to_wheel_carries_everything(built: Built) -> None:
    packed = set(zipfile.ZipFile(built.pure).namelist())
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "sparseflash").rglob("*.py")}
    for folder, kinds in (("patterns", ["py"]), ("kernels", ["py", "h", "cpp"])):
        for kind in kinds:
            behind_link = {
                f"sparseflash/{folder}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob(f"*.{kind}")
            }
            assert behind_link, (folder, kind)
            sources |= behind_link
    assert sources <= packed
    page = {f"sparseflash/pictures/page/{p.name}" for p in (ROOT / "sparseflash" / "pictures" / "page").iterdir()}
    assert "sparseflash/pictures/page/page.html" in page
    assert page <= packed
    assert "sparseflash/py.typed" in packed
    assert not [n for n in packed if n.startswith(("patterns/", "kernels/", "tests/"))]
    with tarfile.open(built.sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"pyproject.toml", "LICENSE", "README.md", "hatch_build.py", "sparseflash/patterns/local.py"} <= names
    assert "sparseflash/kernels/cpu/kernel.cpp" in names
    assert not [n for n in {*names, *packed} if "libraries" in n], "what is compiled belongs to wheels of one platform"


def test_the_platform_wheel_is_the_pure_one_and_the_libraries(built: Built) -> None:
    pure, platform = (set(zipfile.ZipFile(wheel).namelist()) for wheel in (built.pure, built.platform))
    suffix, family = levels.SUFFIX, levels.levels_of(levels.machine())
    assert platform - pure == {f"sparseflash/kernels/cpu/libraries/{level.name}{suffix}" for level in family}
    assert pure - platform == set()
    assert built.pure.name.endswith("-py3-none-any.whl")


@pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
def test_the_platform_wheel_promises_what_its_libraries_keep(built: Built, tmp_path: Path) -> None:
    named = re.search(r"-py3-none-manylinux_(\d+)_(\d+)_(\w+)\.whl$", built.platform.name)
    assert named
    assert named[3] == levels.machine()
    zipfile.ZipFile(built.platform).extractall(tmp_path)
    needed = [elf.needs(library).glibc for library in tmp_path.glob("sparseflash/kernels/cpu/libraries/*")]
    assert max([(2, 17), *(each for each in needed if each)]) == (int(named[1]), int(named[2]))
    (told,) = tmp_path.glob("*.dist-info/WHEEL")
    assert "Root-Is-Purelib: false\nTag: py3-none-manylinux_" in told.read_text()


@pytest.mark.parametrize("which", ["pure", "platform", "sdist"])
def test_it_installs_and_runs_in_an_empty_environment(built: Built, which: str, tmp_path: Path) -> None:
    """No index is asked: dependencies are lent by this environment, and this checkout is out of reach.

    Only the sdist finds a compiler. The pure wheel runs attention on a CPU in torch, the other two in the kernel.
    """
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    lent = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    # A .pth file adds folders without reading the .pth files in them, of which an editable install is one.
    (site / "lent.pth").write_text("\n".join(lent))
    environment = {"PATH": str(tmp_path / "nowhere")}
    if which == "sdist":
        compiler = tmp_path / "compiler"
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
        environment = {"CXX": str(compiler), "SPARSEFLASH_BUILD": "require"}
    install = [
        *(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--ignore-installed", str(getattr(built, which))),
    ]
    run(install, tmp_path, **environment)
    told = run([str(python), "-I", "-W", "error", "-c", PROBE], tmp_path, PATH=str(tmp_path / "nowhere")).splitlines()
    where, kernel, works, shape, refusal = told
    assert Path(where).is_relative_to(tmp_path), where
    if which == "pure":
        assert (
            kernel
            == f"{site / 'sparseflash' / 'kernels' / 'cpu' / 'libraries' / RUN_HERE[-1]}{levels.SUFFIX} is not there"
        )
    else:
        assert kernel == RUN_HERE[-1]
    assert works == "True"
    assert shape == "(1, 2, 40, 16)"
    assert 'pip install "transformers>=5"' in refusal
    if which == "pure":  # built from the sdist, so one command speaks for both
        command = tmp_path / "env" / "bin" / "sparseflash"
        assert "causal" in run([str(command), "show", "causal() & local(100)", "--seq-len", "1000"], tmp_path)


def test_extras_are_declared_and_those_of_the_command_line_ask_for_nothing_new(built: Built) -> None:
    """`pip install sparseflash` runs `sparseflash demo` and `train`: what those extras name is there without them."""
    with zipfile.ZipFile(built.pure) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        told: Message = Parser().parsestr(archive.read(name).decode())
    assert set(told.get_all("Provides-Extra", [])) == EXTRAS
    needs = [str(line).partition(";") for line in told.get_all("Requires-Dist", [])]
    always = {what.strip() for what, _, when in needs if "extra" not in when}
    for extra in ("plot", "train"):
        named = {what.strip() for what, _, when in needs if f"extra == '{extra}'" in when}
        assert named
        assert named <= always, extra
    assert "Typing :: Typed" in told.get_all("Classifier", [])


def test_everything_that_is_installed_is_pinned() -> None:
    """What CI and a release install is what was tested, to the version."""
    pins = {}
    for name in ("constraints.txt", "constraints-release.txt"):
        lines = [line for line in (ROOT / name).read_text().splitlines() if line.strip()]
        assert lines
        assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == []
        pins[name] = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    asked += [need for extra in project["project"]["optional-dependencies"].values() for need in extra]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[<>=; \[]", need)[0]).lower() for need in asked}
    assert names - pins["constraints.txt"] == {"sparseflash"}, "an extra that names others"
    assert {"pip-audit", "cyclonedx-bom", "twine"} <= pins["constraints-release.txt"]
