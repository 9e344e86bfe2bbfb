"""Notebooks are kept without outputs; the site shows them as they came out when it was built.

python -m docs.building.notebooks --strip     # drop what running a notebook left in its file
"""

from __future__ import annotations

import sys
from base64 import b64decode
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import nbformat

from docs.building.places import ROOT

FOLDER = ROOT / "notebooks"
SECONDS = 600  # for one cell, on a machine that does other things too


class Shown(NamedTuple):
    """A notebook as a page: its Markdown, and pictures by the names that the Markdown gives them."""

    markdown: str
    pictures: dict[str, bytes]


def paths() -> list[Path]:
    """All notebooks, the tour first."""
    return sorted(FOLDER.glob("*.ipynb"), key=lambda path: (path.stem != "tour", path.stem))


def title(path: Path) -> str:
    """The heading of the first cell."""
    return str(read(path).cells[0].source).partition("\n")[0].removeprefix("# ")


def read(path: Path) -> Any:
    """A checked notebook."""
    notebook = nbformat.read(path, as_version=4)  # type: ignore[no-untyped-call]
    nbformat.validate(notebook)
    return notebook


def stripped(path: Path) -> str:
    """The text of a notebook without outputs, counts and what an editor noted."""
    notebook = read(path)
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return str(nbformat.writes(notebook)) + "\n"  # type: ignore[no-untyped-call]


def executed(path: Path) -> Any:
    """The notebook with the outputs of a fresh kernel.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    from nbclient import NotebookClient
    from traitlets.config import Config

    notebook = read(path)
    where = {"metadata": {"path": str(ROOT)}}
    with TemporaryDirectory() as sockets:
        # Sockets in a folder of their own, not TCP ports: kernels of two builds at once must not meet.
        config = Config({"KernelManager": {"transport": "ipc", "ip": f"{sockets}/kernel"}})
        client = NotebookClient(
            notebook,
            timeout=SECONDS,
            startup_timeout=SECONDS,
            kernel_name="python3",
            resources=where,
            coalesce_streams=True,
            config=config,
        )
        client.execute()
    return notebook


@cache
def page(path: Path, text: str) -> Shown:
    """The executed notebook as a page; a site that is built again while it is looked at runs only what has changed."""
    return shown(executed(path), path.stem)


def shown(notebook: Any, name: str) -> Shown:
    """An executed notebook as a page of that name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source)
            continue
        parts.append(f"```python\n{cell.source}\n```")
        for output in cell.outputs:
            data = output.get("data", {})
            if "text/html" in data:
                parts.append(data["text/html"])
            elif "image/png" in data:
                picture = f"{name}-{len(pictures)}.png"
                pictures[picture] = b64decode(data["image/png"])
                parts.append(f"![What the cell draws]({picture})")
            else:
                text = output.get("text", data.get("text/plain", ""))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return Shown("\n\n".join(parts) + "\n", pictures)


def main() -> None:
    if sys.argv[1:] != ["--strip"]:
        sys.exit("usage: python -m docs.building.notebooks --strip")
    for path in paths():
        path.write_text(stripped(path))


if __name__ == "__main__":
    main()
