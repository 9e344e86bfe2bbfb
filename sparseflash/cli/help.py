"""How ``--help`` looks: flags without a type, options in groups, paragraphs as wide as the terminal."""

import inspect
from typing import Any

from typer.core import TyperCommand, TyperGroup


class Group(TyperGroup):
    """The program itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        """The options, flags without a type."""
        return _bare(super().get_params(ctx))


class Command(TyperCommand):
    """A command."""

    def __init__(self, *args: Any, help: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, help=None if help is None else flowing(help), **kwargs)

    def get_params(self, ctx: Any) -> list[Any]:
        """The options, flags without a type."""
        return _bare(super().get_params(ctx))


def flowing(text: str) -> str:
    r"""A docstring with each paragraph on one line; what is indented stays as it is.

    Example:
        >>> flowing("Train a\nmodel.\n\n    sparseflash train demo\n")
        'Train a model.\n\n    sparseflash train demo'
    """
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(each if each.startswith(" ") else each.replace("\n", " ") for each in paragraphs)


def _bare(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
