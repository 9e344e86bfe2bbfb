"""Modules that register the patterns of a recipe. Presets and runs name them; they are never imported automatically."""

import re
from collections.abc import Mapping
from typing import Any

MOST = 16
LONGEST = 256


class UnknownPatternError(ValueError):
    """A pattern of a recipe is not registered.

    Attributes:
        imports: the modules that the recipe names, which may register it. They are never imported automatically.
    """

    def __init__(self, message: str, imports: tuple[str, ...]) -> None:
        super().__init__(message)
        self.imports = imports


def checked(imports: Any) -> tuple[str, ...]:
    """Check names of modules from a file or a user.

    Raises:
        ValueError: too many names, or text that is not printable.

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
        error: the error of making the recipe.
        where: the file that holds the recipe, if the error does not name it.
        imports: the modules that it names.
    """
    if isinstance(error, UnknownPatternError) or not re.search(r"no pattern is called '", str(error)):
        return error
    try:
        names = checked(imports)
    except ValueError:
        names = ()
    return UnknownPatternError(f"{where}: {error}" if where else str(error), names)


def named(fields: Any) -> Any:
    """The imports of a recipe from JSON."""
    return fields.get("imports", ()) if isinstance(fields, Mapping) else ()
