"""Errors in plain words: a line on stderr and exit code 2, no traceback."""

import functools
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

import typer
from typer.models import ArgumentInfo, OptionInfo

from sparseflash.cli.saying import say
from sparseflash.pathfinder.workers import WorkerError
from sparseflash.patterns.grid import BLOCK_SIZES

P = ParamSpec("P")
R = TypeVar("R")

# Exceptions of the library for users' mistakes, and of the system for files.
_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, WorkerError)
# Temporary names under which files and folders are written.
_TEMPORARY = re.compile(r"\.(.+)\.(?:[0-9a-f]{16}|part)")
# Options whose name differs from the argument of the library.
_OTHER_NAMES = {"activation_checkpointing": "--save-memory"}


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn expected exceptions into a message and exit code 2, and warnings into notes."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        def note(message: Warning | str, *_: object, **__: object) -> None:
            say(f"note: {in_options(str(message), options(command))}", err=True)

        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = note
            try:
                return command(*args, **kwargs)
            except _EXPECTED as error:
                say(f"error: {in_options(words(error), options(command))}", err=True)
                raise typer.Exit(2) from None
            except MemoryError as error:
                say(f"error: not enough memory ({error})", err=True)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                say("stopped", err=True)
                raise typer.Exit(130) from None

    return run


def words(error: Exception) -> str:
    """The message of an exception; for errors of the system, the reason and the final name of the file.

    Example:
        >>> words(OSError(28, "No space left on device", "runs/a/.model.safetensors.0123456789abcdef"))
        'No space left on device: runs/a/model.safetensors'
    """
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    files = [known_name(Path(str(name))) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([error.strerror, " to ".join(map(str, dict.fromkeys(files)))] if files else [error.strerror])


def known_name(path: Path) -> Path:
    """A path with temporary names replaced by final ones."""
    parts = [found[1] if (found := _TEMPORARY.fullmatch(part)) else part for part in path.parts]
    return Path(*parts)


def options(command: Callable[..., Any]) -> dict[str, str]:
    """Options by the Python name of the parameter."""
    found = dict(_OTHER_NAMES)
    for name, hint in get_type_hints(command, include_extras=True).items():
        for info in getattr(hint, "__metadata__", ()):
            if isinstance(info, ArgumentInfo):
                found[name] = str(info.metavar or name.upper())
            elif isinstance(info, OptionInfo):
                # Inside Annotated, Typer takes the first name for a default.
                long = [str(option) for option in (info.default, *(info.param_decls or ())) if str(option)[:2] == "--"]
                found[name] = long[0] if long else "--" + name.replace("_", "-")
    return found


def in_options(message: str, names: Mapping[str, str]) -> str:
    """A message of the library, with Python's arguments replaced by options of the command line.

    A name of one word counts as an argument if the message begins with it or gives its value. A name with an underscore
    is always an argument.

    Example:
        >>> names = {"heads": "--heads", "kv_heads": "--kv-heads"}
        >>> in_options("heads must be a multiple of kv_heads, got heads=3 and 2", names)
        '--heads must be a multiple of --kv-heads, got --heads 3 and 2'
        >>> in_options("two heads must agree", names)
        'two heads must agree'
    """
    if not names:
        return message
    one = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    subject = re.match(rf"(?:{one})(?:(?: / | and | or |, )(?:{one}))*(?= (?:must|is for|are)\b)", message)
    ends = subject.end() if subject else 0

    def typed(found: re.Match[str]) -> str:
        name, value = found["name"], found["value"]
        if found.start() >= ends and "_" not in name and not value:
            return found[0]
        return names[name] + (" " if value else "")

    # Not part of a path, a call, a quotation or another name.
    return re.sub(rf"(?<![\w./'\"\-])(?P<name>{one})(?:(?P<value>=)|(?!\.?[\w/'\"(=\-]))", typed, message)


def block_size(text: str) -> int | tuple[int, int]:
    """``"128"`` or ``"128x64"`` as `Pattern.compile` takes it.

    Raises:
        ValueError: neither form, or another size.
    """
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--block must be a number such as 128, or two such as 128x64; got {text!r}")
    sizes = [int(part) for part in parts]
    if not set(sizes) <= set(BLOCK_SIZES):
        raise ValueError(f"--block must be of {', '.join(map(str, BLOCK_SIZES))} tokens; got {text!r}")
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])
