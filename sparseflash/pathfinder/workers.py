"""Ordered work in processes that start afresh (the ``spawn`` method) and run one thread each."""

from __future__ import annotations

import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Final, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """``map(function, tasks)`` in order, by ``workers`` processes; in this process when one would do.

    At most two tasks a worker are in flight, so results do not pile up. When the caller stops early, or presses Ctrl-C,
    waiting tasks are dropped, running ones finish, and the processes end.

    Raises:
        RuntimeError: a worker died.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_ignore_interrupts)
    waiting: deque[Future[Result]] = deque()
    try:
        # Processes start as tasks arrive and inherit the environment of that moment.
        with _one_thread():
            for task in tasks[: 2 * workers]:
                waiting.append(pool.submit(function, task))
        for task in tasks[2 * workers :]:
            done = waiting.popleft().result()
            waiting.append(pool.submit(function, task))
            yield done
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died before it finished: it was killed (out of memory?), or the calling script lacks "
            'the `if __name__ == "__main__":` guard that new processes need; workers=1 avoids processes'
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _ignore_interrupts() -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides what happens then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = {name: os.environ.get(name) for name in _THREAD_VARIABLES}
    os.environ.update(dict.fromkeys(_THREAD_VARIABLES, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
