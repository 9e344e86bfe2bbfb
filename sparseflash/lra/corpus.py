"""A task's examples behind one index: the training ones first, then those for validation, then those for the test."""

import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseflash.foreign import check_folder
from sparseflash.lra import cifar, listops, places
from sparseflash.lra.documents import Papers, Reviews
from sparseflash.lra.listops import Grammar
from sparseflash.lra.listops_files import ListOpsFile

TASKS: Final = ("image", "listops", "retrieval", "text")
_SETS: Final = ("train", "val", "test")
# What was published, by task; a folder that has less is read with a warning.
_PUBLISHED: Final = {
    "listops": {"train": 96_000, "val": 2_000, "test": 2_000},
    "text": {"train": 25_000, "test": 25_000},
    "retrieval": {"train": 147_086, "val": 18_090, "test": 17_437},
    "image": {"train": 45_000, "val": 5_000, "test": 10_000},
}


class Example(NamedTuple):
    """What is to be read, and the answer."""

    documents: tuple[NDArray[np.uint8], ...]  # uint8 [N] each: one, or two for retrieval
    label: int


class Stored(Protocol):
    """Examples by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    def digest(self) -> str: ...


class Corpus(Protocol):
    """The examples of a task; ``splits`` says which indices are which set."""

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices."""

    @property
    def digest(self) -> str:
        """Of all files, each line of which has been checked; empty where examples are drawn."""

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Drawn:
    """ListOps trees that are drawn when asked for."""

    grammar: Grammar
    seed: int

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices."""
        return listops.SPLITS

    @property
    def digest(self) -> str:
        """Empty: there are no files."""
        return ""

    def __getitem__(self, index: int) -> Example:
        tokens, answer = self.grammar.draw(self.seed, index)
        return Example((tokens,), answer)


class Files:
    """Sets from files, one after the other."""

    def __init__(self, parts: Mapping[str, tuple[Stored, Sequence[int]]]) -> None:
        self._parts = parts
        self.splits, first = {}, 0
        for name, (_, indices) in parts.items():
            self.splits[name] = range(first, first := first + len(indices))

    @property
    def digest(self) -> str:
        """SHA-256 of all files and of which examples are in which set; looks at every line.

        Raises:
            ValueError: a damaged line.
        """
        found = hashlib.sha256(str(self.splits).encode())
        for stored in dict.fromkeys(stored for stored, _ in self._parts.values()):
            found.update(stored.digest().encode())
        return found.hexdigest()

    def __getitem__(self, index: int) -> Example:
        for name, place in self.splits.items():
            if index in place:
                stored, indices = self._parts[name]
                documents, label = stored[indices[index - place.start]]
                return Example(documents if isinstance(documents, tuple) else (documents,), label)
        raise IndexError(f"example {index} of {self.splits}")


def open_corpus(
    task: str, folder: str | Path = "", grammar: Grammar | None = None, seed: int = 0, *, verify: bool = True
) -> Corpus:
    """The examples of a task. Files that have changed since they were opened are read anew.

    Args:
        task: one of `TASKS`.
        folder: where its files lie: ``listops-1000`` or ``tsv_data`` of the release, ``aclImdb``, or
            ``cifar-10-batches-bin``; the folder above will do too. Empty for ListOps that is drawn.
        grammar: of drawn ListOps.
        seed: of drawn ListOps.
        verify: look at every line now, which takes seconds where the files are large; otherwise damage shows when an
            example is read.

    Raises:
        FileNotFoundError: there is no folder, or a file of it is missing; the message says what to do.
        ValueError: an unknown task, no folder where one is needed, an archive, files of another kind, links that lead
            out of the folder, more than the bounds of `Lines`, `Reviews` and `cifar.Images` allow, or a bad line.

    Example:
        >>> corpus = open_corpus("listops", grammar=Grammar(max_depth=3, min_length=8, max_length=30))
        >>> corpus.splits["test"], len(corpus[98_000].documents)
        (range(98000, 100000), 1)
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}; got {task!r}")
    if not str(folder):
        if task != "listops":
            raise ValueError(f"the task {task} is read from files: name their folder")
        return Drawn(listops.LISTOPS if grammar is None else grammar, seed)
    check_folder(Path(folder))
    inside = places.inner(task, Path(folder))
    try:
        files = _opened(task, inside, Path(folder), places.stamp(task, inside))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{places.hint(task, inside)}") from None
    if verify:
        _ = files.digest  # looks at every line
    return files


@lru_cache(maxsize=8)
def _opened(task: str, folder: Path, named: Path, stamp: object) -> Files:
    if task == "image":
        whole, test = cifar.Images(folder, cifar.TRAIN, named), cifar.Images(folder, cifar.TEST, named)
        cut = len(whole) * 9 // 10
        parts: dict[str, tuple[Stored, range]] = {
            "train": (whole, range(cut)),
            "val": (whole, range(cut, len(whole))),
            "test": (test, range(len(test))),
        }
    else:
        files = {name: _file(task, folder, named, name) for name in _SETS if (task, name) != ("text", "val")}
        parts = {name: (file, range(len(file))) for name, file in files.items()}
    found = {name: len(indices) for name, (_, indices) in parts.items()}
    if found != _PUBLISHED[task]:
        warnings.warn(f"{folder} has {found} examples, not the published {_PUBLISHED[task]}", stacklevel=3)
    return Files(parts)


def _file(task: str, folder: Path, named: Path, split: str) -> Stored:
    if task == "listops":
        return ListOpsFile(folder / f"basic_{split}.tsv", named)
    if task == "retrieval":
        return Papers(folder / f"new_aan_pairs.{'eval' if split == 'val' else split}.tsv", named)
    return Reviews(folder / split, named)
