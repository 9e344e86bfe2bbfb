"""sdist -> wheel carries the folders that are reached through links."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_links_are_tracked_links() -> None:
    for name in ("patterns", "kernels"):
        link = ROOT / "sparseflash" / name
        assert link.is_symlink()
        assert link.readlink() == Path("..") / name


def test_sdist_to_wheel_carries_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,), (sdist,) = tmp_path.glob("*.whl"), tmp_path.glob("*.tar.gz")
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("patterns", "kernels"):
        sources = {f"sparseflash/{folder}/{p.relative_to(ROOT / folder)}" for p in (ROOT / folder).rglob("*.py")}
        assert sources, folder
        assert sources <= packed
    page = {f"sparseflash/patterns/page/{p.name}" for p in (ROOT / "patterns" / "page").iterdir()}
    assert "sparseflash/patterns/page/page.html" in page
    assert page <= packed
    assert "sparseflash/py.typed" in packed
    assert not [n for n in packed if n.startswith(("patterns/", "kernels/", "tests/"))]
    with tarfile.open(sdist) as archive:
        names = {n.split("/", 1)[1] for n in archive.getnames() if "/" in n}
    assert {"pyproject.toml", "LICENSE", "README.md", "sparseflash/patterns/local.py"} <= names
