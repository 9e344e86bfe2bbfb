"""Former names of parameters, which keep working and warn."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def renamed(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: keyword arguments may be given by their former names, with a DeprecationWarning.

    Args:
        names: the present name of a parameter by its former one.

    Example:
        >>> import warnings
        >>> @renamed(colour="color")
        ... def paint(color):
        ...     return color
        >>> with warnings.catch_warnings(record=True):
        ...     warnings.simplefilter("always")
        ...     paint(colour="red")
        'red'
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def called(*args: P.args, **kwargs: P.kwargs) -> R:
            for former, now in names.items():
                if former in kwargs:
                    if now in kwargs:
                        raise TypeError(f"{function.__name__}: {now} and {former}, its former name, are both given")
                    text = f"{function.__name__}: {former}= is now {now}="
                    warnings.warn(text, DeprecationWarning, stacklevel=2)
                    kwargs[now] = kwargs.pop(former)
            return function(*args, **kwargs)

        return called

    return decorate
