"""Write the tables of docs/presets.md: presets from their files, fields from the docstrings of the configs.

Tables stand between ``<!-- table: NAME -->`` and ``<!-- end -->``; the rest of the page is written by hand.

python -m docs.make_presets          # rewrite the tables
python -m docs.make_presets --check  # exit 1 when they are not what the code says
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any, Final

from sparseflash.lra import Grammar
from sparseflash.models import PixelTransformerConfig, SequenceTransformerConfig
from sparseflash.pathfinder import Geometry
from sparseflash.train import FolderStage, SequenceStage, Stage, TrainConfig
from sparseflash.train.tasks import PRESETS, load_preset

PAGE = Path(__file__).parent / "presets.md"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CLASSES: Final[dict[str, type[Any]]] = {
    kind.__name__: kind
    for kind in (
        TrainConfig,
        PixelTransformerConfig,
        SequenceTransformerConfig,
        Stage,
        FolderStage,
        SequenceStage,
        Geometry,
        Grammar,
    )
}


def attributes(kind: type[Any]) -> dict[str, str]:
    """What the docstring of a dataclass says of each field.

    Example:
        >>> attributes(Grammar)["max_args"]
        'most arguments of an operator.'
    """
    text = inspect.cleandoc(kind.__doc__ or "")
    (section,) = re.findall(r"^Attributes:\n(.*?)(?=^\S|\Z)", text, re.DOTALL | re.MULTILINE)
    found: dict[str, list[str]] = {}
    name = ""
    for line in section.splitlines():
        if start := re.match(r" {4}(\w+): (.*)", line):
            name = start[1]
            found[name] = [start[2]]
        elif line.strip():
            found[name].append(line.strip())
    return {name: " ".join(words) for name, words in found.items()}


def cell(text: str) -> str:
    """Text as a cell of a table: one line, and code in single backquotes."""
    return " ".join(text.replace("``", "`").split()).replace("|", "\\|")


def named(kind: Any) -> str:
    """The type of a field as its author wrote it."""
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", str(kind))
    return re.sub(r"\b\w+\.", "", str(kind) if "[" in str(kind) or "|" in str(kind) else text)


def default(field: dataclasses.Field[Any]) -> str:
    """The default of a field; empty where it must be given."""
    return "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"


def fields_table(kind: type[Any]) -> str:
    """A row for each field."""
    about = attributes(kind)
    assert list(about) == [field.name for field in dataclasses.fields(kind)], kind.__name__
    rows = [
        f"| `{field.name}` | `{cell(named(field.type))}` | {cell(default(field))} | {cell(about[field.name])} |"
        for field in dataclasses.fields(kind)
    ]
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def presets_table() -> str:
    """A row for each preset: what its file says of itself."""
    rows = []
    for name in PRESETS:
        preset = load_preset(name)
        batch = f"{preset.config.batch}"
        if preset.cpu_batch != preset.config.batch:
            batch += f", {preset.cpu_batch} on a CPU"
        stages = len(preset.config.stages)
        rows.append(f"| `{name}` | `{preset.config.task}` | {cell(preset.summary)} | {stages} | {batch} |")
    return "\n".join(["| preset | task | what it is | stages | batch |", "|---|---|---|---|---|", *rows, ""])


def table(name: str) -> str:
    """The table of a name."""
    return presets_table() if name == "presets" else fields_table(CLASSES[name])


def page(text: str) -> str:
    """The page with its tables written anew."""
    return TABLE.sub(lambda found: f"{found[1]}\n{table(found[2])}\n{found[3]}", text)


def main() -> None:
    text = PAGE.read_text()
    if "--check" in sys.argv[1:]:
        if page(text) != text:
            sys.exit("docs/presets.md is not what the code says; run make gallery")
        return
    PAGE.write_text(page(text))


if __name__ == "__main__":
    main()
