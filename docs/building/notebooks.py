"""Notebooks are kept with their outputs, which GitHub and the site show; a test runs them again.

python -m docs.building.notebooks            # run all of them and keep what comes out
python -m docs.building.notebooks tour       # or some
"""

from __future__ import annotations

import hashlib
import re
import sys
from base64 import b64decode
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


def written(notebook: Any) -> str:
    """The text of a notebook with its outputs, without what an editor or a clock noted."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            for output in cell.outputs:
                output.pop("metadata", None)
                if "data" in output:
                    output.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "sparseflash": {"outputs_of": sources_digest(notebook)},
    }
    return str(nbformat.writes(notebook)) + "\n"  # type: ignore[no-untyped-call]


def sources_digest(notebook: Any) -> str:
    """What tells whether outputs are those of the cells beside them."""
    return hashlib.sha256("\0".join(cell.source for cell in notebook.cells).encode()).hexdigest()[:16]


def outline(notebook: Any) -> list[list[str]]:
    """What each cell of code gave: pictures, and text without its figures, which differ between machines."""
    return [[_kind(output) for output in cell.outputs] for cell in notebook.cells if cell.cell_type == "code"]


def _kind(output: Any) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return "picture"
    text = output.get("text", data.get("text/html", data.get("text/plain", "")))
    return re.sub(r"[\d.,e+-]+", "0", re.sub(r"base64,[^\"]+", "base64", text))


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


def page(path: Path) -> Shown:
    """A notebook as a page, with the outputs that are kept in its file."""
    return shown(read(path), path.stem)


def shown(notebook: Any, name: str) -> Shown:
    """An executed notebook as a page of that name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    heading = name
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = (re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE) or [heading])[-1]
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
                parts.append(f"![Picture: {heading}]({picture})")
            else:
                text = output.get("text", data.get("text/plain", ""))
                parts.append(f"```text\n{text.rstrip()}\n```")
    return Shown("\n\n".join(parts) + "\n", pictures)


def main(names: list[str]) -> None:
    known = {path.stem: path for path in paths()}
    if unknown := set(names) - set(known):
        sys.exit(f"notebooks are {', '.join(known)}; got {', '.join(sorted(unknown))}")
    for name in names or known:
        known[name].write_text(written(executed(known[name])))


if __name__ == "__main__":
    main(sys.argv[1:])
