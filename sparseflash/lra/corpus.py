"""The examples of a task under one index: first the training set, then the validation set, then the test set."""

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
# Published numbers of examples; a folder with other numbers is read with a warning.
_PUBLISHED: Final = {
    "listops": {"train": 96_000, "val": 2_000, "test": 2_000},
    "text": {"train": 25_000, "test": 25_000},
    "retrieval": {"train": 147_086, "val": 18_090, "test": 17_437},
    "image": {"train": 45_000, "val": 5_000, "test": 10_000},
}


class Example(NamedTuple):
    """The documents to read, and the answer."""

    documents: tuple[NDArray[np.uint8], ...]  # uint8 [N] each: one document, or two for retrieval
    label: int


class Stored(Protocol):
    """Examples of a file or folder, by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Any, int]: ...

    def digest(self) -> str: ...


class Corpus(Protocol):
    """The examples of a task; ``splits`` gives the indices of each set."""

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices."""

    @property
    def digest(self) -> str:
        """SHA-256 of all files, after every line was checked; empty if examples are generated."""

    def __getitem__(self, index: int) -> Example: ...


@dataclass(frozen=True)
class Drawn:
    """ListOps trees, generated on access."""

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
    """Sets from files, in one range of indices."""

    def __init__(self, parts: Mapping[str, tuple[Stored, Sequence[int]]]) -> None:
        self._parts = parts
        self.splits, first = {}, 0
        for name, (_, indices) in parts.items():
            self.splits[name] = range(first, first := first + len(indices))

    @property
    def digest(self) -> str:
        """SHA-256 of all files and of the ranges of the sets; checks every line.

        Raises:
            ValueError: a damaged line.
        """
        digest = hashlib.sha256(str(self.splits).encode())
        for stored in dict.fromkeys(stored for stored, _ in self._parts.values()):
            digest.update(stored.digest().encode())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Example:
        for name, split in self.splits.items():
            if index in split:
                stored, indices = self._parts[name]
                documents, label = stored[indices[index - split.start]]
                return Example(documents if isinstance(documents, tuple) else (documents,), label)
        raise IndexError(f"example {index} of {self.splits}")


def open_corpus(
    task: str, folder: str | Path = "", grammar: Grammar | None = None, seed: int = 0, *, verify: bool = True
) -> Corpus:
    """The examples of a task. Files that changed since they were opened are read again.

    Args:
        task: one of `TASKS`.
        folder: the folder of its files: ``listops-1000`` or ``tsv_data`` of the release, ``aclImdb``, or
            ``cifar-10-batches-bin``; or the parent of that folder. Empty for generated ListOps.
        grammar: of generated ListOps.
        seed: of generated ListOps.
        verify: check every line now, which takes seconds if the files are large; otherwise damage is found when an
            example is read.

    Raises:
        FileNotFoundError: the folder or one of its files is missing; the message says what to do.
        ValueError: an unknown task, no folder for a task that needs one, an archive, files of another format, links
            that lead out of the folder, files beyond the limits of `Lines`, `Reviews` or `cifar.Images`, or a bad line.

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
        files = _open_files(task, inside, Path(folder), places.stamp(task, inside))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}{places.hint(task, inside)}") from None
    if verify:
        _ = files.digest  # checks every line
    return files


@lru_cache(maxsize=8)
def _open_files(task: str, folder: Path, root: Path, stamp: object) -> Files:
    if task == "image":
        published, test = cifar.Images(folder, cifar.TRAIN, root), cifar.Images(folder, cifar.TEST, root)
        cut = len(published) * 9 // 10
        parts: dict[str, tuple[Stored, range]] = {
            "train": (published, range(cut)),
            "val": (published, range(cut, len(published))),
            "test": (test, range(len(test))),
        }
    else:
        files = {name: _open_file(task, folder, root, name) for name in _SETS if (task, name) != ("text", "val")}
        parts = {name: (file, range(len(file))) for name, file in files.items()}
    sizes = {name: len(indices) for name, (_, indices) in parts.items()}
    if sizes != _PUBLISHED[task]:
        warnings.warn(f"{folder} has {sizes} examples, not the published {_PUBLISHED[task]}", stacklevel=3)
    return Files(parts)


def _open_file(task: str, folder: Path, root: Path, split: str) -> Stored:
    if task == "listops":
        return ListOpsFile(folder / f"basic_{split}.tsv", root)
    if task == "retrieval":
        return Papers(folder / f"new_aan_pairs.{'eval' if split == 'val' else split}.tsv", root)
    return Reviews(folder / split, root)
