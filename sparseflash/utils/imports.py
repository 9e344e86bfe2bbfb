"""Modules that register a recipe's patterns: presets and runs name them, and nothing imports them by itself."""

import re
from collections.abc import Mapping
from typing import Any

MOST = 16
LONGEST = 256


class UnknownPatternError(ValueError):
    """A recipe's pattern is not known here.

    Attributes:
        imports: the modules that the recipe names, which may register it; nothing imports them by itself.
    """

    def __init__(self, message: str, imports: tuple[str, ...]) -> None:
        super().__init__(message)
        self.imports = imports


def checked(imports: Any) -> tuple[str, ...]:
    """Names of modules as a file or a user gives them.

    Raises:
        ValueError: too many, or no printable text.

    Example:
        >>> checked(["mine", "patterns/ours.py"])
        ('mine', 'patterns/ours.py')
    """
    if not (isinstance(imports, list | tuple) and len(imports) <= MOST and all(map(_printable, imports))):
        raise ValueError(f"imports must be at most {MOST} names of modules, each printable text; got {imports!r:.200}")
    return tuple(imports)


def _printable(name: Any) -> bool:
    return isinstance(name, str) and 0 < len(name) <= LONGEST and name.isprintable()


def explained(error: ValueError, where: object, imports: Any) -> ValueError:
    """The error itself, or an `UnknownPatternError` with the names of the modules if a pattern is not known.

    Args:
        error: what making the recipe raised.
        where: the file that holds the recipe, if the error does not name it.
        imports: the modules that it names, as they stand there.
    """
    if isinstance(error, UnknownPatternError) or not re.search(r"no pattern is called '", str(error)):
        return error
    try:
        names = checked(imports)
    except ValueError:
        names = ()
    return UnknownPatternError(f"{where}: {error}" if where else str(error), names)


def named(fields: Any) -> Any:
    """What a recipe read from JSON names as its imports."""
    return fields.get("imports", ()) if isinstance(fields, Mapping) else ()
