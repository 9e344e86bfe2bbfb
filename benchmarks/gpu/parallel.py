"""Rows that are prepared side by side and timed alone: several processes take turns on one device.

To prepare a row is to compile kernels and to compare results, on many cores; to time it takes the device for itself.
All that prepare share a lock on a file, and who is about to time asks for it alone: `alone` waits until nobody prepares
and nobody else times.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

Alone = Callable[[], object]


def nobody_else() -> None:
    """What is called before timing where no other process uses the device."""


@contextmanager
def turns(lock: Path) -> Iterator[Alone]:
    """Share the device with other processes that hold the same lock; call what this yields before timing.

    Args:
        lock: a file that is there.
    """
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        # Linux gives up the shared lock before it waits for the exclusive one: two that ask do not wait for each other.
        yield lambda: fcntl.flock(held, fcntl.LOCK_EX)


def processes(at_once: int) -> ProcessPoolExecutor:
    """A process for each row: what an illegal address leaves behind ends with it."""
    # Each row compiles in its own process; torch's compiler would start as many more as there are cores, for each.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    return ProcessPoolExecutor(at_once, get_context("spawn"), max_tasks_per_child=1)
