"""``--import``: code of the user's own that registers patterns; the user names it, for what a file names is not run."""

import importlib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from sparseflash.utils.imports import UnknownPatternError


def import_modules(names: Sequence[str]) -> None:
    """Import modules by name, or by the path of a file; the current folder is looked at first, as in ``python -m``.

    Raises:
        ValueError: a module that is not there, or whose code fails.
    """
    for name in names:
        if name.endswith(".py"):
            _from_file(name)
        else:
            _from_name(name)


def _from_name(name: str) -> None:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"--import must be the name of a module, or the path of a file that ends in .py; got {name!r}")
    folder = os.getcwd()
    _look_in(folder)
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name + ".").startswith(error.name + "."):
            _failed(name, error)
        raise ValueError(f"--import {name}: no module {error.name!r} in {folder}, nor installed") from None
    except Exception as error:  # whatever the user's code raises
        _failed(name, error)


def _from_file(name: str) -> None:
    path = Path(name).resolve()
    if not path.is_file():
        raise ValueError(f"--import {name}: no such file")
    if "." in path.stem:
        raise ValueError(f"--import {name}: a module has no dot in its name; rename the file")
    _look_in(str(path.parent))
    try:
        module = importlib.import_module(path.stem)
    except Exception as error:  # whatever the user's code raises
        _failed(name, error)
    if not _is_from(module, path):
        raise ValueError(f"--import {name}: another module is called {path.stem!r}; rename the file")


def _is_from(module: ModuleType, path: Path) -> bool:
    return getattr(module, "__file__", None) is not None and Path(str(module.__file__)).resolve() == path


def _look_in(folder: str) -> None:
    if folder in sys.path:
        sys.path.remove(folder)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()


def _failed(name: str, error: Exception) -> NoReturn:
    """Say where in the user's file it happened."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    where = f" ({own[-1].filename}, line {own[-1].lineno})" if len(own) > 1 else ""
    raise ValueError(f"--import {name} failed: {type(error).__name__}: {error}{where}") from None


def told(error: ValueError, given: Sequence[str], again: str = "") -> ValueError:
    """The error with what to do where a pattern is not known.

    Args:
        error: what parsing a pattern, a preset or a run's recipe raised.
        given: modules that the user named.
        again: the command that the modules' names belong behind; empty where no file named modules.

    Example:
        >>> missing = UnknownPatternError("runs/a: no pattern is called 'knights_move' here", ("mine",))
        >>> print(told(missing, (), "sparseflash evaluate runs/a"))
        runs/a: no pattern is called 'knights_move' here
        It names the module mine; what a file names is not imported by itself. If you trust it:
          sparseflash evaluate runs/a --import mine
    """
    recorded = error.imports if isinstance(error, UnknownPatternError) else ()
    missing = [name for name in recorded if name not in given]
    if missing and again:
        flags = " ".join(f"--import {shlex.quote(name)}" for name in (*given, *missing))
        modules = f"module{'s' if len(missing) > 1 else ''} {', '.join(missing)}"
        return ValueError(
            f"{error}\nIt names the {modules}; what a file names is not imported by itself. If you trust it:\n"
            f"  {again} {flags}"
        )
    unknown = re.search(r"no pattern is called", str(error)) and "id you mean" not in str(error)
    if unknown and not given:
        return ValueError(f"{error}\nA pattern of your own: --import the module, or the .py file, that registers it.")
    return error
