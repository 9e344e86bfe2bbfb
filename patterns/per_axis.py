"""Arguments given once for all axes of a grid, or once for each axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from sparseflash.patterns.pattern import checked_int

Value = TypeVar("Value", int, bool)


def ints_per_axis(owner: str, name: str, value: int | tuple[int, ...], axes: int, minimum: int) -> tuple[int, ...]:
    """One int of at least ``minimum`` for each axis.

    Raises:
        TypeError: something that is not an int, or a tuple with more or fewer entries than axes.
        ValueError: an int below the minimum.
    """
    return _per_axis(owner, name, value, axes, lambda entry, what: checked_int(owner, what, entry, minimum))


def bools_per_axis(owner: str, name: str, value: bool | tuple[bool, ...], axes: int) -> tuple[bool, ...]:
    """One bool for each axis; raises as :func:`ints_per_axis`."""

    def checked(entry: bool, what: str) -> bool:
        if not isinstance(entry, bool):
            raise TypeError(f"{owner}: {what} must be True or False, got {entry!r}")
        return entry

    return _per_axis(owner, name, value, axes, checked)


def _per_axis(
    owner: str, name: str, value: Value | tuple[Value, ...], axes: int, checked: Callable[[Value, str], Value]
) -> tuple[Value, ...]:
    if not isinstance(value, tuple | list):
        return (checked(value, name),) * axes
    if len(value) != axes:
        raise TypeError(f"{owner}: {name} must be one for all axes or one for each of the {axes}, got {value!r}")
    return tuple(checked(entry, f"{name}[{axis}]") for axis, entry in enumerate(value))


def shortest(values: tuple[Value, ...]) -> Value | tuple[Value, ...]:
    """One value if all are equal, so that equal patterns have equal text."""
    return values[0] if len(set(values)) == 1 else values


def spread(value: Value | tuple[Value, ...], axes: int) -> tuple[Value, ...]:
    """The inverse of :func:`shortest`."""
    return value if isinstance(value, tuple) else (value,) * axes
