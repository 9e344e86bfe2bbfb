"""Errors in plain words: a line on stderr and exit code 2, no traceback."""

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import typer

from sparseflash.pathfinder.workers import WorkerError

P = ParamSpec("P")
R = TypeVar("R")

# What the library raises for a user's mistake, and what the system says about files.
_EXPECTED = (ValueError, TypeError, OSError, FloatingPointError, WorkerError)


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Turn expected exceptions into a message and exit code 2, and warnings into notes."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)
            warnings.showwarning = _note
            try:
                return command(*args, **kwargs)
            except _EXPECTED as error:
                typer.echo(f"error: {error}", err=True)
                raise typer.Exit(2) from None
            except MemoryError as error:
                typer.echo(f"error: this takes more memory than there is ({error})", err=True)
                raise typer.Exit(2) from None
            except KeyboardInterrupt:
                typer.echo("stopped", err=True)
                raise typer.Exit(130) from None

    return run


def _note(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"note: {message}", err=True)


def block_size(text: str) -> int | tuple[int, int]:
    """``"128"`` or ``"128x64"`` as `Pattern.compile` takes it.

    Raises:
        ValueError: neither form.
    """
    parts = text.lower().split("x")
    if not 1 <= len(parts) <= 2 or not all(part.strip().isdecimal() for part in parts):
        raise ValueError(f"--block must be a number such as 128, or two such as 128x64; got {text!r}")
    sizes = [int(part) for part in parts]
    return sizes[0] if len(sizes) == 1 else (sizes[0], sizes[1])
