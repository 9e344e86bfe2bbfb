"""What mkdocs calls while it builds: pages that are made, and links that lead from the repository to the site."""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from benchmarks import report
from docs.building import api, notebooks
from docs.building.places import LINK, MOVED, ROOT, followed, place_of, referring

EXAMPLES = {"examples/needle.py": "Routing learns to find", "examples/sparsify.py": "A dense model becomes sparse"}
LEDGERS = {
    "benchmarks/ledger.md": "Ledger: CPU attention",
    "benchmarks/path256.md": "Ledger: Path-256",
    "benchmarks/lra.md": "Ledger: Long Range Arena",
}
PROJECT = {"CONTRIBUTING.md": "Contributing", "CHANGELOG.md": "Changelog", "SECURITY.md": "Security"}


def on_config(config: MkDocsConfig) -> None:
    """Put the pages that are made here into the menu."""
    measured = [{title: f"benchmarks/{part}.md"} for part, (title, _) in report.site_pages().items()]
    shown = [{notebooks.title(path): f"notebooks/{path.stem}.md"} for path in notebooks.paths()]
    numerics = [{"Errors against float64": "numerics.md"}] if (ROOT / "docs/numerics.md").exists() else []
    config.nav = [
        *(config.nav or []),
        {"Examples": [*shown, *({title: place_of(path)} for path, title in EXAMPLES.items())]},
        {
            "Measurements": [
                "benchmarks/index.md",
                *measured,
                *numerics,
                *({t: place_of(p)} for p, t in LEDGERS.items()),
            ]
        },
        {"API": ["api/index.md", *({page.title: place} for place, page in api.pages().items())]},
        {"Project": [{title: place_of(path)} for path, title in PROJECT.items()]},
    ]


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the pages that no file of docs/ is."""
    for place, content in (made() | ran()).items():
        files.append(File.generated(config, place, content=content))
    for drawn in (ROOT / "benchmarks/results").rglob("*.[ps][nv]g"):
        place = drawn.relative_to(ROOT).as_posix()
        files.append(File.generated(config, place, abs_src_path=str(drawn)))
    for path in sources():
        page = program(path, path)
        hidden = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, place_of(path), content=page, inclusion=hidden))


def on_page_markdown(markdown: str, page: Page, **kwargs: Any) -> str:
    """Follow links, and let code that names something public lead to the reference."""
    place = page.file.src_uri
    if place.startswith(("api/", "notebooks/")):
        return markdown
    home = {to: path for path, to in MOVED.items() if path != "docs/README.md"}
    path = home.get(place, place if (ROOT / place).exists() else f"docs/{place}")
    return referring(followed(markdown, path), api.names())


def made() -> dict[str, str | bytes]:
    """Markdown of the pages that are made, by their place on the site."""
    texts: dict[str, str | bytes] = {
        place_of(path): (ROOT / path).read_text() for path in ("README.md", *PROJECT, *LEDGERS)
    }
    texts |= {place_of(path): program(path, title) for path, title in EXAMPLES.items()}
    measured = report.site_pages()
    texts |= {f"benchmarks/{part}.md": text for part, (_, text) in measured.items()}
    listed = [f"- [{title}]({part}.md)" for part, (title, _) in measured.items()]
    texts["benchmarks/index.md"] = "\n".join([report.front(), *listed, ""])
    texts |= {place: api.markdown(page) for place, page in api.pages().items()}
    listed = [f"- [{page.title}]({place.removeprefix('api/')}): {page.about}" for place, page in api.pages().items()]
    texts["api/index.md"] = "\n".join(["# API\n", *listed, ""])
    return texts


def sources() -> set[str]:
    """Programs that pages link to and that are no examples: tests, mostly."""
    found = set()
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")):
        targets = (page.parent / link[1] for link in LINK.finditer(page.read_text()) if link[1].endswith(".py"))
        found |= {target.resolve().relative_to(ROOT).as_posix() for target in targets}
    return found - EXAMPLES.keys()


def ran() -> dict[str, str | bytes]:
    """Pages of the notebooks and their pictures, by their place on the site. Runs them."""
    found: dict[str, str | bytes] = {}
    for path in notebooks.paths():
        page = notebooks.page(path, path.read_text())
        found[f"notebooks/{path.stem}.md"] = page.markdown
        found |= {f"notebooks/{name}": picture for name, picture in page.pictures.items()}
    return found


def program(path: str, title: str) -> str:
    """A program of the repository as a page."""
    command = path.removesuffix(".py").replace("/", ".")
    about = f"`python -m {command}`, from a checkout.\n\n" if path in EXAMPLES else ""
    return f"# {title}\n\n{about}```python\n{(ROOT / path).read_text()}```\n"
