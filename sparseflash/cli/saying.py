"""What the commands print: names and texts of files reach the terminal with their control characters spelled out."""

import typer

from sparseflash.patterns.shown import shown_lines


def say(text: object, err: bool = False) -> None:
    """A line, or several, on stdout or stderr."""
    typer.echo(shown_lines(text), err=err)
