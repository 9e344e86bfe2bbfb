"""The documentation site builds without a warning, notebooks run, and no link or picture of it is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from atexit import register
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp
from urllib.parse import unquote, urlsplit

import pytest

ROOT = Path(__file__).parents[2]
for library in ("mkdocs", "material", "mkdocstrings", "nbclient", "ipykernel"):
    pytest.importorskip(library, reason=f"{library} is not installed: no site is built")

from docs.building import api, notebooks  # noqa: E402


class Reader(HTMLParser):
    """What a page of HTML links to, the places it can be linked at, and its text outside code."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.prose: list[str] = []
        self._code = 0
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._code += tag in ("code", "pre", "script", "style")
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name in ("id", "name") and value:
                self.ids.add(value)

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in ("code", "pre", "script", "style")

    def handle_data(self, data: str) -> None:
        if not self._code:
            self.prose.append(data)


def missing(folder: Path) -> list[str]:
    """Links between the pages of a site that lead nowhere."""
    pages = {path: Reader(path.read_text()) for path in folder.rglob("*.html") if path.name != "404.html"}
    wrong = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            found = target.exists() and (
                not parts.fragment or target not in pages or parts.fragment in pages[target].ids
            )
            if not found and parts.fragment != "__skip":
                wrong.append(f"{path.relative_to(folder)}: {link}")
    return sorted(set(wrong))


@cache
def built() -> Path:
    """The site, built once for all tests of a process, every warning an error."""
    folder = Path(mkdtemp(prefix="site-"))
    register(rmtree, folder, ignore_errors=True)
    site = folder / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return site


def test_the_site_builds_and_everything_on_it_is_there() -> None:
    site = built()
    assert missing(site) == []

    pages = {path.relative_to(site).as_posix(): Reader(path.read_text()) for path in site.rglob("*.html")}
    anchors = {place: page.ids for place, page in pages.items()}
    for place, about in api.pages().items():
        assert set(about.names) <= anchors[place.replace(".md", ".html")], place
    for place, page in pages.items():
        text = " ".join(page.prose)
        # What docstrings of another kind of markup would leave behind.
        for left in ("``", ">>>", "===", ":func:", ":class:", ":meth:", ":attr:", "::: ", "\\|", "{api}"):
            assert left not in text, f"{place} shows {left!r}: {text[max(0, text.index(left) - 80) :][:160]}"
    titles = [re.findall(r"<title>(.*?)</title>", (site / place).read_text(), re.DOTALL)[0] for place in pages]
    assert len(set(titles)) == len(titles), "each page has a title of its own"
    index = json.loads((site / "search/search_index.json").read_text())
    assert not [entry["location"] for entry in index["docs"] if entry["location"].startswith("tests/")]
    for path in notebooks.paths():
        html = (site / "notebooks" / f"{path.stem}.html").read_text()
        assert len(re.findall(rf'src="{path.stem}-\d+\.png"', html)) >= 3, path.name


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<p id="here"></p><a href="b.html#there">b</a><a href="#here">x</a><img src="c.png">'
    )
    (tmp_path / "b.html").write_text('<a href="a.html#here">a</a><a href="https://example.org">far</a>')
    assert missing(tmp_path) == ["a.html: b.html#there", "a.html: c.png"]


def test_every_public_name_is_in_the_reference() -> None:
    public = {*api.public("sparseflash"), *api.public("sparseflash.patterns"), *api.public("sparseflash.distributed")}
    modules = {f"sparseflash.{name}" for name in ("pathfinder", "patterns", "reference", "routing")}
    known = api.described()
    assert {name for name in public - modules if api.definition(name) not in known} == set()


@pytest.mark.parametrize("path", notebooks.paths(), ids=lambda path: path.name)
def test_notebooks_run_and_their_outputs_are_those_of_their_cells(path: Path) -> None:
    kept = notebooks.read(path)
    again = "run python -m docs.building.notebooks"
    assert kept.metadata["sparseflash"]["outputs_of"] == notebooks.sources_digest(kept), again
    assert path.read_text() == notebooks.written(notebooks.read(path)), again
    assert notebooks.outline(notebooks.executed(path)) == notebooks.outline(kept), again
    assert path.stat().st_size < 500_000
    ids = [cell.id for cell in kept.cells]
    assert len(set(ids)) == len(ids) >= 10
