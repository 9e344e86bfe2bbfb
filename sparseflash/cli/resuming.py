"""``--resume`` and ``--resume auto``: an option whose value may be left out."""

from typing import Any

from sparseflash.cli.help import Command

OPTION = "--resume"
LATEST = "latest"
AUTO = "auto"


class ResumingCommand(Command):
    """A command in which ``--resume`` alone means ``--resume latest``: Typer knows no options with optional values."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Give ``--resume`` its value before the arguments are taken apart."""
        return super().parse_args(ctx, with_value(args))


def with_value(arguments: list[str]) -> list[str]:
    """The arguments, ``--resume`` having a value.

    Example:
        >>> with_value(["demo", "--resume", "--steps", "2"])
        ['demo', '--resume=latest', '--steps', '2']
        >>> with_value(["demo", "--resume", "auto", "--steps", "2"])
        ['demo', '--resume=auto', '--steps', '2']
    """
    found: list[str] = []
    for argument in arguments:
        if argument in (AUTO, LATEST) and found and found[-1] == f"{OPTION}={LATEST}":
            found[-1] = f"{OPTION}={argument}"
        else:
            found.append(f"{OPTION}={LATEST}" if argument == OPTION else argument)
    return found


def check_resume(value: str | None) -> None:
    """Raise ValueError unless this is what ``--resume`` may be."""
    if value not in (None, LATEST, AUTO):
        raise ValueError(f"--resume stands alone, or with auto; got {value!r}")
