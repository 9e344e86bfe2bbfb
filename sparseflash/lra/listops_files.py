"""ListOps as the release has it: ``basic_train.tsv``, ``basic_val.tsv``, ``basic_test.tsv``.

A header ``Source<TAB>Target``, then a tree and its value a line. A tree is written with the parentheses of its binary
form, each argument closing one, ``( ( ( [MAX 2 ) 9 ) ] )``: they say nothing that the brackets do not, the Arena's
tokenizer drops them, and so does the reader here. Lines end in CR LF, as Python's csv module writes them; the reader
takes either end.
"""

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from sparseflash.folder_lock import folder_lock
from sparseflash.lra.lines import Lines
from sparseflash.lra.listops import CLOSE, OPERATORS, SPLITS, SYMBOLS, Grammar
from sparseflash.pathfinder.workers import run_tasks
from sparseflash.patterns.atomic_write import new_folder_beside, remove_leftovers, remove_tree
from sparseflash.patterns.untrusted import open_untrusted

HEADER: Final = b"Source\tTarget"
_NUMBER_OF: Final = {symbol.encode(): number for number, symbol in enumerate(SYMBOLS)}
_TASK = 50


class ListOpsFile:
    """The trees of one file: ``file[i] -> (uint8 [N], value)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another header, or what `Lines` refuses; when a line is read or all are checked, one that is no tree
            and value.
    """

    def __init__(self, path: Path, inside: Path | None = None) -> None:
        self._lines = Lines(path, header=1, inside=inside)
        with open_untrusted(path, inside) as (file, _):
            header = file.readline(100).rstrip(b"\r\n")
        if header != HEADER:
            raise ValueError(f"{path} must begin with {HEADER!r}; it begins with {header!r}")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> tuple[NDArray[np.uint8], int]:
        return self._parsed(index, self._lines[index])

    def digest(self) -> str:
        """SHA-256 of the file, once every line was found to be a tree and its value."""
        return self._lines.digest(self._parsed)

    def _parsed(self, index: int, line: bytes) -> tuple[NDArray[np.uint8], int]:
        source, _, target = line.partition(b"\t")
        if target not in _NUMBER_OF or _NUMBER_OF[target] > 9:
            raise ValueError(f"{self._lines.where(index)}: the target must be a digit; got {target[:20]!r}")
        symbols = source.translate(None, b"()").split()
        try:
            tree = np.array([_NUMBER_OF[symbol] for symbol in symbols], np.uint8)
        except KeyError as error:
            raise ValueError(f"{self._lines.where(index)}: {error} is no symbol of ListOps") from None
        opened, closed = source.count(b"["), source.count(b"]")
        if not symbols or opened != closed:
            raise ValueError(f"{self._lines.where(index)}: no whole tree: {opened} operators, {closed} brackets")
        return tree, int(target)


def written(symbols: Iterable[int]) -> str:
    """A tree as the release writes it.

    Example:
        >>> written([11, 2, 9, 14])
        '( ( ( [MAX 2 ) 9 ) ] )'
    """
    words: list[str] = []
    opened: list[tuple[int, int]] = []  # where each open operator stands, and its arguments so far
    for symbol in symbols:
        if 10 <= symbol < CLOSE:
            opened.append((len(words), 0))
            words.append(OPERATORS[symbol - 10])
            continue
        if symbol == CLOSE:
            at, arguments = opened.pop()
            words[at] = "( " * (arguments + 1) + words[at]
            words.append("] )")
        else:
            words.append(SYMBOLS[symbol])
        if opened:
            at, arguments = opened[-1]
            opened[-1] = at, arguments + 1
            words.append(")")
    return " ".join(words)


def write(out: Path, grammar: Grammar, train: int = 96_000, seed: int = 0, workers: int = 1) -> dict[str, int]:
    """Write the three files into a new folder, which gets its name when they are whole, or into one that is there.

    Files that are there already are refused, and so is a second process that writes to the same place.

    Args:
        out: folder, made if need be.
        grammar: the distribution.
        train: trees in the training file, at most 96,000; the others get a 48th of it each, at least one.
        seed: trees are those of `Grammar.draw`, in the ranges of `SPLITS`.
        workers: processes.

    Returns:
        How many trees each file has.

    Raises:
        ValueError: a number of trees that is not in 1 to 96,000, or another process writes into the folder.
        FileExistsError: a file is there already.
    """
    if not 1 <= train <= len(SPLITS["train"]):
        raise ValueError(f"the training file has 1 to {len(SPLITS['train']):,} trees; got {train!r}")
    counts = {"train": train, "val": max(1, train // 48), "test": max(1, train // 48)}
    out = out.resolve()  # the folder that the user names may be a link
    names = {split: f"basic_{split}.tsv" for split in counts}
    out.parent.mkdir(parents=True, exist_ok=True)
    with folder_lock(out, beside=True):
        for name in names.values():
            if os.path.lexists(out / name):
                raise FileExistsError(f"{out / name} is there already; write into another folder")
        remove_leftovers(out.parent, out.name)
        temporary = new_folder_beside(out)
        try:
            for split, count in counts.items():
                indices = SPLITS[split][:count]
                parts = [indices[start : start + _TASK] for start in range(0, count, _TASK)]
                with (temporary / names[split]).open("xb") as file:
                    file.write(HEADER + b"\r\n")
                    rows = run_tasks(partial(_rows, grammar, seed), parts, workers)
                    console = Console(stderr=True)
                    for row in track(rows, names[split], total=len(parts), console=console, transient=True):
                        file.write(row)
            _put(temporary, out)
        finally:
            remove_tree(temporary)
    return counts


def _put(temporary: Path, out: Path) -> None:
    """Give a folder its name; where one that is not empty has it already, its files are put there one by one."""
    try:
        os.rename(temporary, out)
    except OSError:
        if not out.is_dir():
            raise
        for path in sorted(temporary.iterdir()):
            os.rename(path, out / path.name)


def _rows(grammar: Grammar, seed: int, indices: range) -> bytes:
    trees = (grammar.draw(seed, index) for index in indices)
    return b"".join(f"{written(tree.tolist())}\t{value}\r\n".encode() for tree, value in trees)
