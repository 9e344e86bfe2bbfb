"""Untrusted text for a terminal: characters that would move the cursor or reverse the text are escaped."""

from __future__ import annotations

import re

# Control characters, marks of direction, line separators, and surrogates, as in names of files that cannot be decoded.
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
    """The same for text of several lines, such as a message; line breaks and tabs are kept."""
    return _LINES.sub(_spelled, str(text))


def _spelled(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
