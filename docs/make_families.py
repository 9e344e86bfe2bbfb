"""Write the table of families on docs/transformers.md from the results of ``python -m tests.integrations.families``.

The table stands between ``<!-- table: families -->`` and ``<!-- end -->``; the rest of the page is written by hand.

python -m docs.make_families          # rewrite the table
python -m docs.make_families --check  # exit 1 when it is not what the results say
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Final

PAGE = Path(__file__).parent / "transformers.md"
RESULTS = Path(__file__).parent.parent / "tests" / "integrations" / "families" / "results.json"
TABLE = re.compile(r"(<!-- table: families -->\n).*?(<!-- end -->)", re.DOTALL)
CROSS = "pattern for cross-attention"
ROWS: Final = {
    "equal to eager": "equal",
    "refused: its mask adds numbers to the scores": r"adds other numbers",
    "refused: selects keys itself": "selects keys itself",
    "refused: computes attention itself, or has none": "mixes its tokens on its own|computes its attention itself",
    "refused": ".",
}


def row_of(found: dict[str, str]) -> str | None:
    """The row in which a family stands; None for one of which no small model was built, or none that eager can call.

    Example:
        >>> row_of({"plain": "equal", "static cache": "eager cannot"})
        'equal to eager'
        >>> row_of({"refused": "AXK2Attention selects keys itself (its indexer)"})
        'refused: selects keys itself'
    """
    if "not built" in found:
        return None
    found = {way: what for way, what in found.items() if way != CROSS}
    refused = " ".join(text for text in [*found, *found.values()] if "refused" in text or "refused" in found)
    if not refused:
        return next(iter(ROWS)) if found.get("plain") == "equal" else None
    return next(row for row, words in list(ROWS.items())[1:] if re.search(words, refused))


def table(results: Path = RESULTS) -> str:
    """A row for each outcome, and how many families there are of each."""
    recorded = json.loads(results.read_text())
    rows: dict[str | None, list[str]] = {}
    for family, found in recorded["families"].items():
        rows.setdefault(row_of(found), []).append(family)
    lines = [f"| Transformers {recorded['transformers']} | families |", "|---|---|"]
    lines += [f"| {row} ({len(rows[row])}) | {', '.join(rows[row])} |" for row in ROWS if row in rows]
    crossing = [family for family, found in recorded["families"].items() if found.get(CROSS) == "equal"]
    lines.append(f"| of them with a pattern for cross-attention ({len(crossing)}) | {', '.join(crossing)} |")
    return "\n".join(lines) + f"\n\nNo small text model was built of {len(rows.get(None, []))} more.\n"


def page(text: str) -> str:
    """The page with the table as it is now."""
    return TABLE.sub(lambda found: found[1] + table() + found[2], text)


def main() -> None:
    """Rewrite the page, or check it."""
    text = PAGE.read_text()
    if "--check" in sys.argv:
        sys.exit(page(text) != text)
    PAGE.write_text(page(text))


if __name__ == "__main__":
    main()
