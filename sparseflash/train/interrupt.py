"""Ctrl-C and SIGTERM during training: stop between two steps, never inside one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self


class Interrupt:
    """Turns SIGINT and SIGTERM into `KeyboardInterrupt`, delayed inside `shield` until its end.

    A step that has not reached its shielded part has changed nothing and is dropped, so parameters, optimizer and step
    number are always consistent.

    Args:
        at_once: raise outside shields; if false, only note it in `asked`, for processes that must stop together.

    Attributes:
        asked: whether a signal has come.
        raised: whether one was raised as an exception. Other code may have replaced the exception: numpy raises
            TypeError for any error in a comparison of records.

    Example:
        >>> with Interrupt() as interrupt:
        ...     with interrupt.shield():
        ...         pass  # update everything, save
        >>> interrupt.asked
        False
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, at_once: bool = True) -> None:
        self.asked = self.raised = False
        self._at_once = at_once
        self._shields = 0
        # Only the main thread may set signal handlers; in other threads training runs without them.
        self._active = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> Self:
        if self._active:
            self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self._active:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def hold(self) -> None:
        """From now on only note signals in `asked`."""
        self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._raise_if_due()

    @contextmanager
    def shield(self) -> Iterator[None]:
        """Hold signals back until the block is left."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        if self.asked:
            self._raise_if_due()

    def _raise_if_due(self) -> None:
        if self._at_once and not self._shields:
            self.raised = True
            raise KeyboardInterrupt
