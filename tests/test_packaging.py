"""sdist -> wheel carries the folders that are reached through links; both install and import far from the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXTRAS = {"dev", "docs", "plot", "train", "transformers"}

# Run by the Python of an environment that has the package and its dependencies, and neither this folder nor the
# optional packages in reach.
PROBE = """
import importlib, pkgutil, sys
sys.modules["transformers"] = sys.modules["peft"] = None  # as if they were not there
import sparseflash
print(sparseflash.__file__)
for module in pkgutil.walk_packages(sparseflash.__path__, "sparseflash."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
import torch
import sparseflash.kernels.cpu  # a folder without __init__.py, through a link in the checkout
q = torch.randn(1, 2, 40, 16)
print(tuple(sparseflash.attention(q, q, q, sparseflash.parse("causal() & local(9)")).shape))
try:
    sparseflash.integrations.transformers.register()
except ImportError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, built from the sdist, and the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def run(command: list[str], cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_links_are_tracked_links() -> None:
    for name in ("patterns", "kernels"):
        link = ROOT / "sparseflash" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_sdist_to_wheel_carries_everything(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "sparseflash").rglob("*.py")}
    for folder in ("patterns", "kernels"):
        behind_link = {f"sparseflash/{folder}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")}
        assert behind_link, folder
        sources |= behind_link
    assert sources <= packed
    page = {f"sparseflash/patterns/page/{p.name}" for p in (ROOT / "patterns" / "page").iterdir()}
    assert "sparseflash/patterns/page/page.html" in page
    assert page <= packed
    assert "sparseflash/py.typed" in packed
    assert not [n for n in packed if n.startswith(("patterns/", "kernels/", "tests/"))]
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"pyproject.toml", "LICENSE", "README.md", "sparseflash/patterns/local.py"} <= names


@pytest.mark.parametrize("which", ["wheel", "sdist"])
def test_it_installs_and_imports_in_an_empty_environment(built: tuple[Path, Path], which: str, tmp_path: Path) -> None:
    """No index is asked: dependencies are lent by this environment, and this checkout is out of reach."""
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    lent = [p for p in sys.path if Path(p).name in ("site-packages", "dist-packages")]
    # A .pth file adds folders without reading the .pth files in them, of which an editable install is one.
    (site / "lent.pth").write_text("\n".join(lent))
    run([
        *(sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index", "--no-deps"),
        *("--no-build-isolation", "--ignore-installed", str(built[0 if which == "wheel" else 1])),
    ])  # fmt: skip
    where, shape, refusal = run([str(python), "-I", "-W", "error", "-c", PROBE], tmp_path).splitlines()
    assert Path(where).is_relative_to(tmp_path), where
    assert shape == "(1, 2, 40, 16)"
    assert 'pip install "sparseflash[transformers]"' in refusal
    if which == "wheel":  # built from the sdist, so one command speaks for both
        command = tmp_path / "env" / "bin" / "sparseflash"
        assert "causal" in run([str(command), "show", "causal() & local(100)", "--seq-len", "1000"], tmp_path)


def test_extras_are_declared_and_those_of_the_command_line_ask_for_nothing_new(built: tuple[Path, Path]) -> None:
    """`pip install sparseflash` runs `sparseflash demo` and `train`: what those extras name is there without them."""
    with zipfile.ZipFile(built[0]) as archive:
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
    assert {"pip-audit", "cyclonedx-bom"} <= pins["constraints-release.txt"]
