"""What mkdocs calls while it builds: pages that are made, and links that lead from the repository to the site."""

from __future__ import annotations

import re
import tomllib
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from benchmarks import report
from docs.building import api, notebooks
from docs.building.places import LINK, MOVED, ROOT, both_schemes, followed, place_of, plain_cells, referring

EXAMPLES = {
    "examples/denoise.py": "A video model becomes sparse",
    "examples/moving_shapes.py": "A video model learns motion",
    "examples/needle.py": "Routing learns to find",
    "examples/sparsify.py": "A dense model becomes sparse",
}
LEDGERS = ("benchmarks/ledger.md", "benchmarks/path256.md", "benchmarks/lra.md")
PROJECT = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")
PLAIN = ("LICENSE", "CITATION.cff")  # files that pages link to as they are
# Pages of the menu that may be absent.
OPTIONAL = {"numerics.md", "beside-others.md", "environment.md", "presets.md", "troubleshooting.md"}
FRONT = """---
title: Block-sparse attention for long sequences
template: home.html
---
"""
NOT_SEARCHED = "---\nsearch:\n  exclude: true\n---\n"  # sources of tests


def on_config(config: MkDocsConfig) -> None:
    """Fill in the menu, and the repository's address if the package names one."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    if address := project.get("urls", {}).get("Repository"):
        config.repo_url, config.repo_name = address, "Repository"
    pages = {
        "{api}": [{page.title: place} for place, page in api.pages().items()],
        "{machines}": [{machine.name: f"benchmarks/{machine.page}"} for machine in report.machines()],
    }
    config.nav = menu(config.nav or [], pages)


def menu(entries: list[Any], pages: dict[str, list[Any]]) -> list[Any]:
    """Entries of the menu with lists of pages in the place of their names, and without pages that are not there."""
    found: list[Any] = []
    for entry in entries:
        target = next(iter(entry.values())) if isinstance(entry, dict) else entry
        if isinstance(target, list):
            found.append({next(iter(entry)): menu(target, pages)})
        elif target in pages:
            found += pages[target]
        elif target not in OPTIONAL or (ROOT / "docs" / target).exists():
            found.append(entry)
    return found


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that no file of docs/ is."""
    for place, content in (made() | shown()).items():
        files.append(File.generated(config, place, content=content))
    for drawn in (*(ROOT / "benchmarks/results").rglob("*.[ps][nv]g"), *(ROOT / "benchmarks/plots").glob("*.svg")):
        place = drawn.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(drawn)))
    for name in PLAIN:
        if (ROOT / name).exists():
            files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    for path in sources():
        page = NOT_SEARCHED + program(path, path)
        hidden = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place_of(path), content=page, inclusion=hidden))


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Follow links, and let code that names something public lead to the reference."""
    place = page.file.src_uri
    if place.startswith("api/"):
        return markdown
    if place.startswith("notebooks/"):
        return followed(markdown, place.replace(".md", ".ipynb"))
    home = {to: path for path, to in MOVED.items() if path != "docs/README.md"}
    path = home.get(place, place if (ROOT / place).exists() else f"docs/{place}")
    return referring(followed(both_schemes(plain_cells(markdown)), path), api.names())


def made() -> dict[str, str | bytes]:
    """Markdown of the pages that are made, by their place on the site."""
    measured = [f"benchmarks/{machine.page}" for machine in report.machines()]
    texts: dict[str, str | bytes] = {
        place_of(path): (ROOT / path).read_text()
        for path in ("README.md", "benchmarks/README.md", *PROJECT, *LEDGERS, *measured)
    }
    texts["index.md"] = FRONT + re.sub(r"\A# .*\n", "", (ROOT / "README.md").read_text())
    texts |= {place_of(path): program(path, title) for path, title in EXAMPLES.items()}
    texts |= {place: api.markdown(page) for place, page in api.pages().items()}
    listed = [f"- [{page.title}]({place.removeprefix('api/')}): {page.about}" for place, page in api.pages().items()]
    texts["api/index.md"] = "\n".join(["# Reference\n", *listed, ""])
    return texts


def sources() -> set[str]:
    """Programs that pages link to and that are no examples: tests, mostly."""
    found = set()
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")):
        targets = (page.parent / link[1] for link in LINK.finditer(page.read_text()) if link[1].endswith(".py"))
        found |= {target.resolve().relative_to(ROOT).as_posix() for target in targets}
    return found - EXAMPLES.keys()


def shown() -> dict[str, str | bytes]:
    """Pages of the notebooks and their pictures, by their place on the site."""
    found: dict[str, str | bytes] = {}
    for path in notebooks.paths():
        page = notebooks.page(path)
        found[f"notebooks/{path.stem}.md"] = page.markdown
        found |= {f"notebooks/{name}": picture for name, picture in page.pictures.items()}
    return found


def program(path: str, title: str) -> str:
    """A program of the repository as a page."""
    command = path.removesuffix(".py").replace("/", ".")
    about = f"`python -m {command}`, from a checkout.\n\n" if path in EXAMPLES else ""
    return f"# {title}\n\n{about}```python\n{(ROOT / path).read_text()}```\n"
