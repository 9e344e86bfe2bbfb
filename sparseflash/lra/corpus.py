"""A task's examples behind one index: the training ones first, then those for validation, then those for the test."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from sparseflash.lra import cifar, listops
from sparseflash.lra.documents import Papers, Reviews
from sparseflash.lra.listops import Grammar
from sparseflash.lra.listops_files import ListOpsFile

TASKS: Final = ("image", "listops", "retrieval", "text")
_SETS: Final = ("train", "val", "test")
_FOLDER: Final = {
    "listops": "listops-1000",
    "text": "aclImdb",
    "retrieval": "tsv_data",
    "image": "cifar-10-batches-bin",
}
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


class Corpus(Protocol):
    """The examples of a task; ``splits`` says which indices are which set."""

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices."""

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

    def __getitem__(self, index: int) -> Example:
        for name, places in self.splits.items():
            if index in places:
                stored, indices = self._parts[name]
                documents, label = stored[indices[index - places.start]]
                return Example(documents if isinstance(documents, tuple) else (documents,), label)
        raise IndexError(f"example {index} of {self.splits}")


def open_corpus(task: str, folder: str | Path = "", grammar: Grammar | None = None, seed: int = 0) -> Corpus:
    """The examples of a task.

    Args:
        task: one of `TASKS`.
        folder: where its files lie: ``listops-1000`` or ``tsv_data`` of the release, ``aclImdb``, or
            ``cifar-10-batches-bin``; the folder above will do too. Empty for ListOps that is drawn.
        grammar: of drawn ListOps.
        seed: of drawn ListOps.

    Raises:
        FileNotFoundError: there is no folder, or a file of it is missing.
        ValueError: an unknown task, no folder where one is needed, or files of another kind.

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
    return _opened(task, Path(folder))


@lru_cache(maxsize=8)
def _opened(task: str, folder: Path) -> Files:
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    folder = _inner(task, folder)
    if task == "image":
        whole, test = cifar.Images(folder, cifar.TRAIN), cifar.Images(folder, cifar.TEST)
        cut = len(whole) * 9 // 10
        parts: dict[str, tuple[Stored, range]] = {
            "train": (whole, range(cut)),
            "val": (whole, range(cut, len(whole))),
            "test": (test, range(len(test))),
        }
    else:
        files = {name: _file(task, folder, name) for name in _SETS if (task, name) != ("text", "val")}
        parts = {name: (file, range(len(file))) for name, file in files.items()}
    found = {name: len(indices) for name, (_, indices) in parts.items()}
    if found != _PUBLISHED[task]:
        warnings.warn(f"{folder} has {found} examples, not the published {_PUBLISHED[task]}", stacklevel=3)
    return Files(parts)


def _file(task: str, folder: Path, split: str) -> Stored:
    if task == "listops":
        return ListOpsFile(folder / f"basic_{split}.tsv")
    if task == "retrieval":
        return Papers(folder / f"new_aan_pairs.{'eval' if split == 'val' else split}.tsv")
    return Reviews(folder / split)


def _inner(task: str, folder: Path) -> Path:
    """The folder with the files, where the one above was named."""
    # The release's archive holds a folder lra_release in another; the inner one is the complete one.
    nested = folder / "lra_release" / "lra_release", folder / "lra_release", folder
    return next((place / _FOLDER[task] for place in nested if (place / _FOLDER[task]).is_dir()), folder)
