"""ListOps as the release has it: ``basic_train.tsv``, ``basic_val.tsv``, ``basic_test.tsv``.

A header ``Source<TAB>Target``, then one tree and its value per line. A tree is written with the parentheses of its
binary form, in which each argument closes one: ``( ( ( [MAX 2 ) 9 ) ] )``. They add nothing to the brackets; the
Arena's tokenizer drops them, and so does this reader. Lines end in CR LF, as Python's csv module writes them; the
reader also accepts LF.
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

from sparseflash.lra.lines import Lines
from sparseflash.lra.listops import CLOSE, OPERATORS, SPLITS, SYMBOLS, Grammar
from sparseflash.pathfinder.workers import run_tasks
from sparseflash.patterns.atomic_write import new_folder_beside, remove_leftovers, remove_tree
from sparseflash.patterns.untrusted import open_untrusted
from sparseflash.utils.folder_lock import folder_lock

HEADER: Final = b"Source\tTarget"
_TOKEN_ID: Final = {symbol.encode(): number for number, symbol in enumerate(SYMBOLS)}
_TASK = 50  # trees


class ListOpsFile:
    """The trees of one file: ``file[i] -> (uint8 [N], value)``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another header, or as `Lines`. When a line is read or all are checked: it is not a tree and its
            value.
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
        return self._parse(index, self._lines[index])

    def digest(self) -> str:
        """SHA-256 of the file; checks that every line is a tree and its value."""
        return self._lines.digest(self._parse)

    def _parse(self, index: int, line: bytes) -> tuple[NDArray[np.uint8], int]:
        source, _, target = line.partition(b"\t")
        if target not in _TOKEN_ID or _TOKEN_ID[target] > 9:
            raise ValueError(f"{self._lines.where(index)}: the target must be a digit; got {target[:20]!r}")
        symbols = source.translate(None, b"()").split()
        try:
            tree = np.array([_TOKEN_ID[symbol] for symbol in symbols], np.uint8)
        except KeyError as error:
            raise ValueError(f"{self._lines.where(index)}: {error} is not a symbol of ListOps") from None
        opened, closed = source.count(b"["), source.count(b"]")
        if not symbols or opened != closed:
            raise ValueError(f"{self._lines.where(index)}: no whole tree: {opened} operators, {closed} brackets")
        return tree, int(target)


def written(symbols: Iterable[int]) -> str:
    """A tree in the format of the release.

    Example:
        >>> written([11, 2, 9, 14])
        '( ( ( [MAX 2 ) 9 ) ] )'
    """
    words: list[str] = []
    opened: list[tuple[int, int]] = []  # index in words of each open operator, and its arguments so far
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
    """Write the three files into a folder. A new folder gets its name when all files are complete.

    Existing files are refused, and so is a second process that writes to the same folder.

    Args:
        out: folder, created if missing.
        grammar: the distribution.
        train: trees in the training file, at most 96,000; each other file gets a 48th of this, at least one.
        seed: of `Grammar.draw`; the indices are those of `SPLITS`.
        workers: number of processes.

    Returns:
        Number of trees in each file.

    Raises:
        ValueError: a number of trees that is not in 1 to 96,000, or another process writes into the folder.
        FileExistsError: a file exists already.
    """
    if not 1 <= train <= len(SPLITS["train"]):
        raise ValueError(f"the training file has 1 to {len(SPLITS['train']):,} trees; got {train!r}")
    counts = {"train": train, "val": max(1, train // 48), "test": max(1, train // 48)}
    out = out.resolve()  # the named folder may be a link
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
            _move_into_place(temporary, out)
        finally:
            remove_tree(temporary)
    return counts


def _move_into_place(temporary: Path, out: Path) -> None:
    """Rename a folder to ``out``; if ``out`` is a folder with files already, move the files into it one by one."""
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
