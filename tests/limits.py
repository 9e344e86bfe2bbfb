"""Limits that a test sets on its own process, so that a failure is a failure and not a dead machine."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def little_memory(megabytes: int) -> Iterator[None]:
    """No more than that beside what this process has: more is a MemoryError, or torch's RuntimeError."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


class HangsError(AssertionError):
    """What was to end has not."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What happens inside ends in time, or is ended with a `HangsError`; only in the main thread."""

    def ring(*_: object) -> None:
        raise HangsError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
