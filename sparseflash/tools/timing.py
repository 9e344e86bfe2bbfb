"""Timing several calls beside each other in one process: what every benchmark here measures with.

A machine's speed drifts, so contenders take turns: one round times every call once, and a figure is the median of a
contender's times over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]  # seconds that a call takes
Key = TypeVar("Key", bound=Hashable)

LEAST = 3  # rounds that are timed however little time there is: a median needs them


@dataclass
class Timings(Generic[Key]):
    """What came of each call, in seconds."""

    first: dict[Key, float] = field(default_factory=dict)  # the first call, with whatever it compiles
    times: dict[Key, list[float]] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)  # those that raised, and what


def wall(call: Call) -> float:
    """Seconds on the wall."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def waiting_for(device: torch.device | str) -> Clock:
    """Seconds on the wall until a device is done."""
    if torch.device(device).type != "cuda":
        return wall

    def clock(call: Call) -> float:
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        call()
        torch.cuda.synchronize(device)
        return time.perf_counter() - begun

    return clock


def time_interleaved(
    calls: Mapping[Key, Call | Sequence[Call]],
    runs: int,
    clock: Clock = wall,
    *,
    may_fail: Callable[[Key], bool] = lambda _: False,
    seconds: float = float("inf"),
    progress: Callable[[str], object] = lambda _: None,
) -> Timings[Key]:
    """Times of every call, in turn, several times over; the first round is a warm-up.

    Args:
        calls: what is timed. Several calls under one key do the same on operands of their own, so that a round does not
            find in a cache what the one before left there; each round takes the next.
        runs: timed rounds.
        clock: what a call's seconds are read off.
        may_fail: whether a call that raises is left out from there on; otherwise the error goes on.
        seconds: no round begins after that long, except for the first three timed ones.
        progress: told what is being done, a line at a time.

    Example:
        >>> found = time_interleaved({"sum": lambda: sum(range(100)), "max": lambda: max(range(100))}, runs=3)
        >>> [len(times) for times in found.times.values()]
        [3, 3]
    """
    begun = time.perf_counter()
    found: Timings[Key] = Timings()
    turns = {key: list(call) if isinstance(call, Sequence) else [call] for key, call in calls.items()}
    for run in range(runs + 1):
        if run > LEAST and time.perf_counter() - begun > seconds:
            break
        for key, same in list(turns.items()):
            progress(f"round {run} of {runs}: {_words(key)}")
            try:
                if run:
                    found.times.setdefault(key, []).append(clock(same[run % len(same)]))
                    continue
                found.first[key] = clock(same[0])
                for call in same[1:]:
                    call()
            except Exception as error:
                if not may_fail(key):
                    raise
                found.failed[key] = reason(error)
                found.times.pop(key, None)
                del turns[key]
    return found


def reason(error: Exception) -> str:
    """One line that says what went wrong."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _words(key: Hashable) -> str:
    return " ".join(str(x) for x in key if x) if isinstance(key, tuple) else str(key)
