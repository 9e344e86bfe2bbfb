"""Text and JSON from files that others may have written: bounded in size and depth."""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 16 << 20


def read_text(path: Path) -> str:
    """A text file of at most `MOST_BYTES` bytes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: longer, or no text.
    """
    if (size := path.stat().st_size) > MOST_BYTES:
        raise ValueError(f"{path} has {size:,} bytes; at most {MOST_BYTES:,} are read")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not a text file") from None


def parse_json(text: str) -> Any:
    """Plain data from JSON.

    Raises:
        ValueError: no JSON, or nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
