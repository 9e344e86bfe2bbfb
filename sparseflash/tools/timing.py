"""Interleaved timing of several calls in one process, for every benchmark of this project.

The speed of a machine drifts, so contenders take turns: each round times every call once, and a result is the median of
a contender's times over the rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

Call = Callable[[], Any]
Clock = Callable[[Call], float]  # the seconds that a call takes
Key = TypeVar("Key", bound=Hashable)

LEAST = 3  # timed rounds in any case, because a median needs three


@dataclass
class Timings(Generic[Key]):
    """The times of each call, in seconds."""

    first: dict[Key, float] = field(default_factory=dict)  # the first call, including compilation
    times: dict[Key, list[float]] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)  # calls that raised, with the error


def wall(call: Call) -> float:
    """Wall-clock seconds of a call."""
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def waiting_for(device: torch.device | str) -> Clock:
    """A clock of wall-clock seconds until a device is done."""
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
    """Time every call in turn, over several rounds; the first round is a warm-up.

    Args:
        calls: the calls to time. Several calls under one key do the same with different operands, so that a round finds
            nothing in a cache from the round before; each round takes the next one.
        runs: number of timed rounds.
        clock: returns the seconds of a call.
        may_fail: whether a call that raises is dropped; otherwise the error propagates.
        seconds: start no round after this time, except for the first three timed ones.
        progress: called with a line about each round.

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
    """One line about an error."""
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _words(key: Hashable) -> str:
    return " ".join(str(x) for x in key if x) if isinstance(key, tuple) else str(key)
