"""The pages of the repository and the blocks of code in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")],
    key=lambda path: path.relative_to(ROOT).as_posix(),
)
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.M
)


class Block(NamedTuple):
    """A block of code on a page."""

    page: str  # from the root
    line: int
    language: str
    code: str
    why: str | None  # it is not run

    @property
    def is_session(self) -> bool:
        """Whether it shows what an interpreter answers."""
        return self.language == "python" and ">>>" in self.code

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    r"""Blocks of a page in order.

    Example:
        >>> blocks_of("a\n\n<!-- not run: long -->\n```bash\nmake demo\n```\n", "x.md")
        [Block(page='x.md', line=3, language='bash', code='make demo\n', why='long')]
    """
    return [
        Block(page, text[: found.start()].count("\n") + 1, found["language"], found["code"], found["why"])
        for found in BLOCK.finditer(text)
    ]


def prose_of(text: str) -> str:
    r"""A page without its blocks of code.

    Example:
        >>> prose_of("a\n\n```bash\nmake demo\n```\n\nb\n")
        'a\n\n\n\nb\n'
    """
    return BLOCK.sub("", text)


BLOCKS = [block for path in PAGES for block in blocks_of(path.read_text(), path.relative_to(ROOT).as_posix())]
