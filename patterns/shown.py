"""Text that somebody else wrote, for a terminal: what would move the cursor or turn the text around is spelled out."""

from __future__ import annotations

import re

# Control characters, marks of direction, separators of lines, and halves of characters, as undecodable names have them.
UNSEEN = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff"
_LINE = re.compile(f"[{UNSEEN}]")
_LINES = re.compile(f"(?![\\n\\t])[{UNSEEN}]")


def shown(text: object) -> str:
    r"""The text on one line, with its control characters as Python writes them.

    Example:
        >>> print(shown("sample\x1b[2J\n.png"))
        sample\x1b[2J\n.png
    """
    return _LINE.sub(_spelled, str(text))


def shown_lines(text: object) -> str:
    """The same for text of several lines, such as a message: ends of lines and tabs stay."""
    return _LINES.sub(_spelled, str(text))


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
