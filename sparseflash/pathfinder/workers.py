"""Ordered tasks in worker processes, which are spawned, run one thread each, and are replaced if they die."""

from __future__ import annotations

import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Final, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

_THREAD_VARIABLES: Final = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
_DEATHS: Final = 3  # in a row without a result in between; then the work is abandoned


class WorkerError(RuntimeError):
    """Worker processes died repeatedly, without a result in between."""


class Workers(Generic[Task, Result]):
    """Calls of one function in other processes; results come in the order of the calls.

    If a worker dies (killed for lack of memory, for example), all workers are restarted and unfinished tasks run again,
    so the function must return the same result for the same task. Workers end when this process ends, however it ends.

    Args:
        function: picklable, of one argument.
        count: number of processes.

    Example:
        >>> import math
        >>> workers = Workers(math.factorial, 1)
        >>> workers.submit(3)
        >>> workers.submit(4)
        >>> workers.take(), workers.take()
        (6, 24)
        >>> workers.close()
    """

    def __init__(self, function: Callable[[Task], Result], count: int) -> None:
        self._function, self._count = function, count
        self._waiting: deque[tuple[Task, Future[Result]]] = deque()
        self._deaths = 0
        self._pool = self._start_pool()

    def submit(self, task: Task) -> None:
        """Give a task to the workers.

        Raises:
            WorkerError: the workers die repeatedly.
        """
        while True:
            try:
                self._waiting.append((task, self._call(task)))
                return
            except BrokenProcessPool as error:
                self._replace(error)

    def take(self) -> Result:
        """The result of the oldest task that has not been taken.

        Raises:
            WorkerError: the workers die repeatedly.
        """
        while True:
            try:
                result = self._waiting[0][1].result()
            except BrokenProcessPool as error:
                self._replace(error)
            else:
                self._waiting.popleft()
                self._deaths = 0
                return result

    def drop(self) -> None:
        """Forget the submitted tasks."""
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()

    def close(self) -> None:
        """End the processes; running tasks finish, waiting tasks do not start."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _start_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._count, get_context("spawn"), initializer=_init_worker)

    def _call(self, task: Task) -> Future[Result]:
        # Processes start when tasks arrive and inherit the environment of that moment.
        with _one_thread():
            return self._pool.submit(self._function, task)

    def _replace(self, error: BrokenProcessPool) -> None:
        """Replace broken processes by new ones and submit the unfinished tasks again."""
        while True:
            self._deaths += 1
            if self._deaths >= _DEATHS:
                raise WorkerError(
                    f"worker processes died {_DEATHS} times before they finished anything: they were killed (out of "
                    'memory?), or the calling script lacks the `if __name__ == "__main__":` guard that new processes '
                    "need; fewer workers need less memory, workers=1 avoids processes"
                ) from error
            warnings.warn("a worker process died before it finished; its work is done again", stacklevel=3)
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = self._start_pool()
            try:
                again = [(task, future if _has_result(future) else self._call(task)) for task, future in self._waiting]
            except BrokenProcessPool as later:
                error = later
                continue
            self._waiting = deque(again)
            return


def run_tasks(function: Callable[[Task], Result], tasks: Sequence[Task], workers: int) -> Iterator[Result]:
    """``map(function, tasks)`` in order, by ``workers`` processes; in this process if one is enough.

    At most two tasks per worker are in flight, so results do not pile up. If the caller stops early, or on Ctrl-C,
    waiting tasks are dropped, running tasks finish, and the processes end. A worker that dies is replaced.

    Raises:
        WorkerError: the workers die repeatedly.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    pool = Workers(function, workers)
    try:
        for task in tasks[: 2 * workers]:
            pool.submit(task)
        for task in tasks[2 * workers :]:
            done = pool.take()
            pool.submit(task)
            yield done
        for _ in tasks[: 2 * workers]:
            yield pool.take()
    finally:
        pool.close()


def _has_result(future: Future[Result]) -> bool:
    try:
        return future.done() and not isinstance(future.exception(), BrokenProcessPool)
    except CancelledError:
        return False


def _init_worker() -> None:
    # Ctrl-C reaches the whole process group; only the parent reacts to it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    # A killed parent cannot notify its workers, and each of them keeps open the queue on which all wait.
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


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
