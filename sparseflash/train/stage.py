"""What training asks of a stage: drawn images, images in files and sequences answer it each in a class of their own."""

from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from sparseflash.models import ModelConfig
from sparseflash.train.batch import Batch


class AnyStage(Protocol):
    """One stage of a curriculum: `Stage`, `FolderStage` or `SequenceStage`."""

    @property
    def size(self) -> int:
        """Side of the images, or most tokens of a document."""

    @property
    def length(self) -> int | None:
        """Most tokens of a document; None for images."""

    @property
    def tokens_each(self) -> int:
        """Tokens of an example: all pixels of an image, or those that are read of a document."""

    @property
    def tokens(self) -> str | None:
        """Which pixels are tokens; None for what the model's config says."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the model beside the inputs."""

    @property
    def noun(self) -> str:
        """What its examples are called: images or examples."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that can be drawn of a model's answers, see `sparseflash.train.figures.FIGURES`."""

    @property
    def drawn(self) -> bool:
        """Whether examples are drawn, not read from files."""

    @property
    def folder(self) -> str:
        """Where the files are; empty where examples are drawn."""

    @property
    def examples(self) -> int:
        """Number of examples in the files, once `noted`; 0 before, and where examples are drawn."""

    @property
    def digest(self) -> str:
        """Digest of the files, once `noted`; empty before, and where examples are drawn."""

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices; the training one begins at 0. Opens the files."""

    @property
    def rule(self) -> str:
        """The rule of thumb that a model must beat, for people."""

    @property
    def baseline(self) -> float | None:
        """Accuracy of that rule, if the recipe says it."""

    def known_baseline(self) -> float:
        """Accuracy of that rule: as is known of a published task, or measured now, which may take seconds."""

    def batch(
        self,
        seed: int,
        indices: NDArray[np.int64] | range,
        dense: bool = False,
        symmetries: NDArray[np.int64] | None = None,
    ) -> Batch:
        """Examples, see `sparseflash.train.data.draw`."""

    def sample(self, count: int, seed: int, length: int | None = None) -> Batch:
        """Examples for measurements: nothing is read from files.

        Args:
            count: how many.
            seed: of images that are drawn.
            length: tokens of a document, if not as many as this stage reads.
        """

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless this model can read these examples."""

    def check_recipe(self, augment: bool, dense: bool) -> None:
        """Raise ValueError where the examples cannot be mirrored, or have no ground truth for a dense loss."""

    def check_shared(self, model: ModelConfig, ranks: int) -> None:
        """Raise ValueError unless so many ranks can share the tokens of an example."""

    def noted(self) -> Self:
        """The same stage with the number and the digest of its files, all of which are read."""

    def moved(self, folder: str) -> Self:
        """The same stage, its files being in another folder now; nothing is read."""

    def reading(self, folder: Path) -> Self:
        """The same stage with whatever files are in a folder, noted; itself where images are drawn."""

    def of_files(
        self, stages: tuple["AnyStage", ...], folder: Path, level: str | None, split: str | None
    ) -> tuple["AnyStage", ...]:
        """The stages of a task whose last one this is, once its examples are files.

        Args:
            stages: those of the recipe.
            folder: where the files are, absolute.
            level: of images, as the user gave it.
            split: of images, as the user gave it.

        Raises:
            ValueError: a level or a split of sequences, or ones that images do not have.
        """
