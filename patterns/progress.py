"""A progress bar for loops that turn out to be long."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from sparseflash.patterns.shown import shown


def track(steps: range, what: str, *, after_s: float = 1.0) -> Iterator[int]:
    """Yield the steps, with a progress bar on a terminal's stderr after ``after_s`` seconds."""
    begun = time.monotonic()
    iterator = iter(steps)
    done = 0
    for step in iterator:
        yield step
        done += 1
        if time.monotonic() - begun > after_s and sys.stderr.isatty():
            break
    else:
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import track as bar

    yield from bar(
        iterator, escape(shown(what)), total=len(steps), completed=done, console=Console(stderr=True), transient=True
    )
