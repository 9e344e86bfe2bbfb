"""How ``--help`` looks: flags without a type, options in groups, paragraphs as wide as the terminal."""

import inspect
from collections.abc import Mapping
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


def grouped(groups: Mapping[str, str], base: type[Command] = Command) -> type[Command]:
    """A command whose options stand in groups.

    Args:
        groups: title -> the options in it, separated by spaces, in the order in which they are shown.
        base: the kind of command that it is beside that.

    Example:
        >>> kind = grouped({"Data": "--data --folder", "Run": "--out"})
        >>> issubclass(kind, Command)
        True
    """
    place = {option: (title, number) for title, names in groups.items() for number, option in enumerate(names.split())}
    titles = list(groups)

    class Grouped(base):  # type: ignore[valid-type, misc]
        def get_params(self, ctx: Any) -> list[Any]:
            params = super().get_params(ctx)
            for param in params:
                if found := _place(param, place):
                    param.rich_help_panel = found[0]
            # Groups are shown in the order in which their first options come.
            return sorted(params, key=lambda param: _rank(_place(param, place), titles))

    return Grouped


def flowing(text: str) -> str:
    r"""A docstring with each paragraph on one line; what is indented stays as it is.

    Example:
        >>> flowing("Train a\nmodel.\n\n    sparseflash train demo\n")
        'Train a model.\n\n    sparseflash train demo'
    """
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(each if each.startswith(" ") else each.replace("\n", " ") for each in paragraphs)


def _place(param: Any, places: Mapping[str, tuple[str, int]]) -> tuple[str, int] | None:
    return next((places[option] for option in param.opts if option in places), None)


def _rank(place: tuple[str, int] | None, titles: list[str]) -> tuple[int, int]:
    return (len(titles), 0) if place is None else (titles.index(place[0]), place[1])


def _bare(params: list[Any]) -> list[Any]:
    for param in params:
        if getattr(param, "is_flag", False) and param.metavar is None:
            param.metavar = ""
    return params
