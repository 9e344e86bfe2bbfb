"""Every command that a page or a help text names is one that the program takes: all are parsed, none is run."""

from __future__ import annotations

import contextlib
import re
import shlex
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import typer
from typer.main import get_command

from sparseflash.cli import app
from tests.pages import BLOCKS, PAGES, ROOT, prose_of

ROOT_COMMAND: Any = get_command(app)
COMMANDS: dict[str, Any] = ROOT_COMMAND.commands
OPTIONS = {option for param in ROOT_COMMAND.params for option in param.opts} | {"--help", "-h"}
# Click's, wherever typer keeps it.
UsageError: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
# What a command in prose may leave out: an argument, or the value of its last option.
LEFT_OUT = ("MissingParameter", "BadOptionUsage")
# Placeholders on pages that stand for a number.
NUMBERS = {"N": "1"}


def words_of(line: str) -> list[list[str]]:
    """The words of each command of a shell's line, without comments, pipes and redirections.

    Example:
        >>> words_of('sparseflash show "a | b" --json > x.json && make demo  # why')
        [['sparseflash', 'show', 'a | b', '--json'], ['make', 'demo']]
    """
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    skip = False
    for word in lexer:
        if word in ("|", "&&", "||", ";", "&"):
            commands.append([])
        elif re.fullmatch(r"[<>]+", word):
            skip = True
        elif skip:
            skip = False
        else:
            commands[-1].append(word)
    return [command for command in commands if command]


def ours(words: list[str]) -> list[str] | None:
    """What follows ``sparseflash``, also under torchrun and ``python -m``; None for other programs.

    Example:
        >>> ours("torchrun --nproc-per-node 4 -m sparseflash train path256".split())
        ['train', 'path256']
    """
    if words[0] == "sparseflash":
        return words[1:]
    if words[0] in ("python", "torchrun") and "sparseflash" in words and words[words.index("sparseflash") - 1] == "-m":
        return words[words.index("sparseflash") + 1 :]
    return None


def complaint(arguments: list[str]) -> Any:
    """What a user who types this would be told; parsing stops before the command is called."""
    arguments = [NUMBERS.get(word, word) for word in arguments]
    try:
        with contextlib.suppress(typer.Exit):  # of options that print and leave
            if arguments[0] in COMMANDS:
                COMMANDS[arguments[0]].make_context(arguments[0], arguments[1:])
            elif arguments[0] not in OPTIONS:  # these act while they are parsed: --install-completion writes files
                context = ROOT_COMMAND.make_context("sparseflash", list(arguments))
                ROOT_COMMAND.resolve_command(context, list(arguments))
    except UsageError as error:
        return error
    return None


def lines_of_blocks() -> Iterator[tuple[str, str]]:
    for block in BLOCKS:
        if block.language == "bash":
            for line in block.code.replace("\\\n", " ").splitlines():
                yield str(block), line


def lines_of_help() -> Iterator[tuple[str, str]]:
    for name, command in COMMANDS.items():
        for line in command.help.splitlines():
            if line.startswith("    "):
                yield f"sparseflash {name} --help", line.strip()


def inline() -> Iterator[tuple[str, str]]:
    """Code in the prose of pages that begins as a command."""
    for path in PAGES:
        for code in re.findall(r"`((?:sparseflash|torchrun|make) [^`]+)`", prose_of(path.read_text())):
            yield path.relative_to(ROOT).as_posix(), " ".join(code.split())


WHOLE = [
    (place, found)
    for place, line in (*lines_of_blocks(), *lines_of_help())
    for words in words_of(line)
    if (found := ours(words)) is not None
]
PARTS = [(place, found) for place, line in inline() if (found := ours(words_of(line)[0])) is not None]
MAKES = sorted(
    {tuple(words) for _, line in (*lines_of_blocks(), *inline()) for words in words_of(line) if words[0] == "make"}
)


@pytest.mark.parametrize(("place", "arguments"), WHOLE, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_in_blocks_and_help_are_taken(place: str, arguments: list[str]) -> None:
    assert complaint(arguments) is None, place


@pytest.mark.parametrize(("place", "arguments"), PARTS, ids=lambda value: value if isinstance(value, str) else "")
def test_commands_in_prose_are_taken(place: str, arguments: list[str]) -> None:
    """They may leave out what a command needs, but name nothing that is not there."""
    told = complaint(arguments)
    assert told is None or type(told).__name__ in LEFT_OUT, f"{place}: {told}"


def test_every_command_is_named_somewhere() -> None:
    assert {arguments[0] for _, arguments in WHOLE} >= set(COMMANDS)
    assert PARTS


@pytest.mark.parametrize("words", MAKES, ids=" ".join)
def test_targets_of_make_are_in_the_makefile(words: tuple[str, ...]) -> None:
    done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_make_help_lists_is_there() -> None:
    text = (ROOT / "Makefile").read_text()
    listed = re.search(r"^help:\n((?:\t@echo .*\n)+)", text, re.MULTILINE)
    assert listed is not None
    names = {
        name for line in re.findall(r'"make ([a-z |]+)', listed[1]) for name in re.split(r" \| ", line.split("  ")[0])
    }
    assert {"demo", "test", "lint"} <= {name.split()[0] for name in names}
    for name in names:
        assert re.search(rf"^{name.split()[0]}:", text, re.MULTILINE), name


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "demo", "--presett", "x"],
        ["train", "demo", "--steps", "many"],
        ["trian", "demo"],
        ["show"],
        ["train", "demo", "more"],
        ["--instal-completion"],
    ],
    ids=" ".join,
)
def test_what_is_no_command_is_noticed(arguments: list[str]) -> None:
    assert complaint(arguments) is not None


def test_examples_of_these_helpers_run() -> None:
    import doctest
    import sys

    failed, tried = doctest.testmod(sys.modules[__name__])
    assert tried
    assert not failed
