"""Stages of the Long Range Arena's sequence tasks: their examples, and the number of tokens that a model reads."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sparseflash.lra import LISTOPS, TASKS, Corpus, Grammar, open_corpus
from sparseflash.lra.listops import SYMBOLS, majority_share
from sparseflash.models import ModelConfig
from sparseflash.pathfinder.splits import SEED
from sparseflash.train.batch import Batch
from sparseflash.train.folder_stage import other_files
from sparseflash.train.stage import AnyStage
from sparseflash.utils.untrusted import check_field_types

# Symbols, documents and classes of a task's examples.
SHAPES: Final = {
    "listops": (len(SYMBOLS), 1, 10),
    "text": (256, 1, 2),
    "retrieval": (256, 2, 2),
    "image": (256, 1, 10),
}
MOST_TOKENS = 1 << 20  # per document; recipes may be untrusted
ROUNDED = 64
"""Rows are filled up to a multiple of this, so that there are few lengths."""


@dataclass(frozen=True)
class SequenceStage:
    """One stage of a sequence task.

    Attributes:
        task: one of `sparseflash.lra.TASKS`.
        length: maximum tokens of a document; longer ones are truncated.
        folder: where the files are; empty for generated ListOps.
        grammar: the grammar of generated ListOps; None for the Arena's.
        baseline: share of the most frequent answer, if known.
        examples: number of examples in the files, once `noted`; 0 before, and for generated ones.
        digest: digest of the files, once `noted`; empty before, and for generated examples.

    Raises:
        ValueError: an unknown task, a length below 1, or trees that are longer.

    Example:
        >>> stage = SequenceStage("listops", 32, grammar=Grammar(max_depth=3, min_length=8, max_length=30))
        >>> tokens, values = stage.draw(seed=0, indices=range(2))
        >>> tokens.shape, values.tolist()
        (torch.Size([2, 32]), [9, 1])
    """

    task: str
    length: int
    folder: str = ""
    grammar: Grammar | None = None
    baseline: float | None = None
    examples: int = 0
    digest: str = ""

    tokens: ClassVar[None] = None
    options: ClassVar[dict[str, Any]] = {}
    noun: ClassVar[str] = "examples"
    figures: ClassVar[tuple[str, ...]] = ()
    rule: ClassVar[str] = "the most frequent answer"

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"a stage's task must be one of {', '.join(TASKS)}; got {self.task!r}")
        if not 1 <= self.length <= MOST_TOKENS:
            raise ValueError(f"a stage's length must be at least 1, at most {MOST_TOKENS:,}; got {self.length!r}")
        if self.grammar is not None and (self.task != "listops" or self.folder):
            raise ValueError("a grammar is for ListOps that is drawn, not read from files")
        longest = (self.grammar or LISTOPS).max_length - 1
        if self.drawn and longest > self.length:
            raise ValueError(f"trees of up to {longest:,} symbols would be cut off at {self.length:,}")

    def __str__(self) -> str:
        if not self.drawn:
            return f"{self.task}, {self.length:,} tokens"
        grammar = self.grammar or LISTOPS
        least, most = grammar.min_length + 1, grammar.max_length - 1
        return f"listops, {least:,} to {most:,} symbols" if least < most else f"listops, {most:,} symbols"

    @property
    def drawn(self) -> bool:
        """Whether examples are drawn, not read from files."""
        return self.task == "listops" and not self.folder

    @property
    def size(self) -> int:
        """Maximum tokens of a document."""
        return self.length

    @property
    def tokens_each(self) -> int:
        """Tokens read from a document."""
        return self.length

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices; opens the files."""
        return self._corpus().splits

    def noted(self) -> Self:
        """The same stage with the number of examples in its files and their digest; every line is read.

        Raises:
            FileNotFoundError: no such folder or file.
            ValueError: damaged files, or other files than noted before.
        """
        if self.drawn:
            return self
        corpus = open_corpus(self.task, self.folder)
        examples, digest = sum(map(len, corpus.splits.values())), corpus.digest
        if self.digest and (examples, digest) != (self.examples, self.digest):
            raise ValueError(other_files(self.folder, self.examples, examples))
        return replace(self, examples=examples, digest=digest)

    def moved(self, folder: str) -> Self:
        """The same stage for files that are now in another folder; nothing is read."""
        return replace(self, folder=folder)

    def reading(self, folder: Path) -> Self:
        """The same stage, noted for the files in a folder; raises like `noted`."""
        return replace(self, folder=str(folder.resolve()), grammar=None, examples=0, digest="").noted()

    def of_files(
        self, stages: tuple[AnyStage, ...], folder: Path, level: str | None, split: str | None
    ) -> tuple[AnyStage, ...]:
        """All stages of the recipe, of examples in files.

        Raises:
            ValueError: a level or a split, which only images have.
        """
        if level is not None or split is not None:
            raise ValueError(f"level and split are of Pathfinder images; the files of {self.task} are split already")
        # All stages of a sequence task have the same task.
        own = cast(tuple[SequenceStage, ...], stages)
        return tuple(replace(stage, folder=str(folder), grammar=None) for stage in own)

    def _corpus(self, seed: int = SEED) -> Corpus:
        if self.drawn or not self.digest:
            return open_corpus(self.task, self.folder, self.grammar, seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # `noted` has warned already
            corpus = open_corpus(self.task, self.folder, verify=False)
        if (examples := sum(map(len, corpus.splits.values()))) != self.examples:
            raise ValueError(other_files(self.folder, self.examples, examples))
        return corpus

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless this model can read these examples."""
        symbols, documents, classes = SHAPES[self.task]
        if not model.symbols:
            raise ValueError(f"the task {self.task} needs a model over symbols; this one is over pixels")
        if (model.symbols, model.documents, model.classes) != (symbols, documents, classes):
            raise ValueError(
                f"the task {self.task} has {symbols} symbols, {documents} documents an example and {classes} classes; "
                f"the model has {model.symbols}, {model.documents} and {model.classes}"
            )

    def check_recipe(self, augment: bool, dense: bool) -> None:
        """Raise ValueError if images would be mirrored. A model over symbols has no dense head."""
        if augment:
            raise ValueError("augment mirrors images; sequences have no such symmetry")

    def check_shared(self, model: ModelConfig, ranks: int) -> None:
        """Refuse: ranks can share the tokens of images only."""
        raise ValueError(
            f"ranks share the tokens of images, not of the sequences of {self.task}; leave context_parallel at 1"
        )

    def batch(
        self,
        seed: int,
        indices: NDArray[np.int64] | range,
        dense: bool = False,
        symmetries: NDArray[np.int64] | None = None,
    ) -> Batch:
        """The examples of `draw` as a batch. Sequences have neither symmetries nor ground truth for a dense loss."""
        return Batch(*self.draw(seed, indices), None)

    def sample(self, count: int, seed: int, length: int | None = None) -> Batch:
        """Random symbols of full length, drawn by torch, which cost as much as real ones of that length."""
        symbols, documents, classes = SHAPES[self.task]
        each = self.length if length is None else length
        tokens = torch.randint(symbols, (count, documents, each), dtype=torch.int16)
        labels = torch.randint(classes, (count,))
        return Batch(tokens if documents > 1 else tokens[:, 0], labels, None)

    def draw(self, seed: int, indices: Iterable[int]) -> tuple[Tensor, Tensor]:
        """Examples: int16 [B, N], or [B, 2, N] of pairs, with -1 behind the end, and their labels int64 [B]."""
        corpus = self._corpus(seed)
        examples = [corpus[int(index)] for index in indices]
        documents = [document[: self.length] for example in examples for document in example.documents]
        tokens = padded(documents, self.length)
        labels = torch.tensor([example.label for example in examples])
        return (tokens.view(len(examples), 2, -1) if SHAPES[self.task][1] == 2 else tokens), labels

    def known_baseline(self) -> float:
        """Share of the most frequent answer, see `majority`."""
        return self.majority()

    def majority(self) -> float:
        """Share of the most frequent answer among a thousand drawn trees; chance if files were not counted."""
        return majority_share(self.grammar or LISTOPS) if self.drawn else 1 / SHAPES[self.task][2]


def padded(documents: list[np.ndarray[Any, np.dtype[np.uint8]]], most: int) -> Tensor:
    """Documents as rows int16 [S, N] with -1 behind their ends; N is a multiple of 64, or ``most`` itself."""
    longest = max(map(len, documents))
    rows = np.full((len(documents), min(most, -(-longest // ROUNDED) * ROUNDED)), -1, np.int16)
    for row, document in zip(rows, documents, strict=True):
        row[: len(document)] = document
    return torch.from_numpy(rows)


def sequence_stage_from(fields: dict[str, Any]) -> SequenceStage:
    """The stage that `dataclasses.asdict` described.

    Raises:
        TypeError: fields are missing or unknown.
        ValueError: fields out of range.
    """
    grammar = fields.get("grammar")
    grammar = None if grammar is None else Grammar(**check_field_types(Grammar, grammar))
    return SequenceStage(**check_field_types(SequenceStage, {**fields, "grammar": grammar}))
