"""Options that several commands have, and commands that take their options as one dataclass."""

import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Annotated, Any, TypeVar, get_type_hints

import typer

Options = TypeVar("Options")

DEVICE = "cpu, cuda, cuda:1 ...  Default: a GPU if there is one."
IMPORT: Any = {
    "metavar": "MODULE",
    "help": "Your own code that registers patterns: a module or a .py file. Can be repeated.",
}
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Device = Annotated[str | None, typer.Option(help=DEVICE)]
Imports = Annotated[list[str] | None, typer.Option("--import", **IMPORT)]


def takes(kind: type[Options]) -> Callable[[Callable[[Options], None]], Callable[..., None]]:
    """Make a function of one dataclass a command that has an option for each of its fields.

    Args:
        kind: the dataclass; its fields are annotated as a command's parameters are.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Sizes:
        ...     width: Annotated[int, typer.Option(help="In pixels.")] = 8
        >>> @takes(Sizes)
        ... def draw(sizes):
        ...     print(sizes)
        >>> inspect.signature(draw).parameters["width"].default
        8
        >>> draw(width=16)
        Sizes(width=16)
    """
    hints = get_type_hints(kind, include_extras=True)

    def parameter(field: Any) -> inspect.Parameter:
        default = inspect.Parameter.empty if field.default is MISSING else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        return inspect.Parameter(field.name, kind, default=default, annotation=hints[field.name])

    def decorate(function: Callable[[Options], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            function(kind(**given))

        command.__annotations__ = hints
        command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter(field) for field in fields(kind)]  # type: ignore[arg-type]
        )
        return command

    return decorate
