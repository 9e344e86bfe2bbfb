"""The interface of a stage, with a class each for drawn images, images in files and sequences."""

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
        """Side of the images, or maximum tokens of a document."""

    @property
    def length(self) -> int | None:
        """Maximum tokens of a document; None for images."""

    @property
    def tokens_each(self) -> int:
        """Tokens of an example: all pixels of an image, or the tokens read from a document."""

    @property
    def tokens(self) -> str | None:
        """Which pixels are tokens; None for what the model's config says."""

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the model besides the inputs."""

    @property
    def noun(self) -> str:
        """The word for its examples: images or examples."""

    @property
    def figures(self) -> tuple[str, ...]:
        """Names of the figures that can be drawn from a model's answers, see `sparseflash.train.figures.FIGURES`."""

    @property
    def drawn(self) -> bool:
        """Whether examples are drawn, not read from files."""

    @property
    def folder(self) -> str:
        """The folder of the files; empty if examples are drawn."""

    @property
    def examples(self) -> int:
        """Number of examples in the files, once `noted`; 0 before, and if examples are drawn."""

    @property
    def digest(self) -> str:
        """Digest of the files, once `noted`; empty before, and if examples are drawn."""

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices; the training one begins at 0. Opens the files."""

    @property
    def rule(self) -> str:
        """Description of the baseline, a simple rule."""

    @property
    def baseline(self) -> float | None:
        """Accuracy of the baseline, if the recipe has it."""

    def known_baseline(self) -> float:
        """Accuracy of the baseline: known for a published task, otherwise measured now, which may take seconds."""

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
            count: number of examples.
            seed: seed of drawn images.
            length: tokens of a document, if different from the stage.
        """

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless this model can read these examples."""

    def check_recipe(self, augment: bool, dense: bool) -> None:
        """Raise ValueError if the recipe mirrors examples or has a dense loss, and these examples do not allow it."""

    def check_shared(self, model: ModelConfig, ranks: int) -> None:
        """Raise ValueError unless this many ranks can share the tokens of an example."""

    def noted(self) -> Self:
        """The same stage with the number and the digest of its files, all of which are read."""

    def moved(self, folder: str) -> Self:
        """The same stage for files that are now in another folder; nothing is read."""

    def reading(self, folder: Path) -> Self:
        """The same stage, noted for the files in a folder; the stage itself if images are drawn."""

    def of_files(
        self, stages: tuple["AnyStage", ...], folder: Path, level: str | None, split: str | None
    ) -> tuple["AnyStage", ...]:
        """The stages of a task with examples in files, from this, its last stage.

        Args:
            stages: those of the recipe.
            folder: where the files are, absolute.
            level: of images, as the user gave it.
            split: of images, as the user gave it.

        Raises:
            ValueError: a level or a split of sequences, or ones that images do not have.
        """
