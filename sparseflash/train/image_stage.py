"""A stage whose Pathfinder images are drawn."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sparseflash import pathfinder
from sparseflash.models import ModelConfig
from sparseflash.models.sharing import check_shared
from sparseflash.pathfinder import SPLITS, Geometry
from sparseflash.train.baseline import geometry_baseline
from sparseflash.train.batch import Batch
from sparseflash.train.folder_stage import DISTANCE, check_pixels, check_tokens, stage_of_files
from sparseflash.train.stage import AnyStage


@dataclass(frozen=True)
class Stage:
    """One stage of a curriculum: its images, and which of their pixels are tokens.

    Attributes:
        geometry: the distribution of the images.
        match_distance: draw images so that the distance of the two markers does not predict the label, see
            `sparseflash.pathfinder`.
        tokens: which pixels are tokens in this stage; None for what the model's config says.
        baseline: accuracy of the best rule that uses only the distance of the two markers, if known.
    """

    geometry: Geometry
    match_distance: bool = False
    tokens: str | None = None
    baseline: float | None = None

    length: ClassVar[None] = None
    noun: ClassVar[str] = "images"
    figures: ClassVar[tuple[str, ...]] = ("mistakes", "attention")
    drawn: ClassVar[bool] = True
    folder: ClassVar[str] = ""
    examples: ClassVar[int] = 0
    digest: ClassVar[str] = ""
    splits: ClassVar[dict[str, range]] = SPLITS
    rule: ClassVar[str] = DISTANCE

    def __str__(self) -> str:
        return f"{self.geometry.size} px, {self.geometry.contour_length} dashes"

    def __post_init__(self) -> None:
        check_tokens(self.tokens)

    @property
    def size(self) -> int:
        """Side of the images."""
        return self.geometry.size

    @property
    def tokens_each(self) -> int:
        """Tokens of an example, if all pixels are."""
        return self.size**2

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the model besides the images."""
        return {"tokens": self.tokens}

    def known_baseline(self) -> float:
        """Accuracy by the distance of the markers: known for a published task, otherwise measured now."""
        return geometry_baseline(self.geometry, self.match_distance)

    def batch(
        self,
        seed: int,
        indices: NDArray[np.int64] | range,
        dense: bool = False,
        symmetries: NDArray[np.int64] | None = None,
    ) -> Batch:
        """Images of these indices, drawn; see `sparseflash.train.data.draw`."""
        images, labels, truths = pathfinder.draw(self.geometry, seed, indices, self.match_distance)
        targets = np.stack([pathfinder.curve_targets(truth) for truth in truths]) if dense else None
        return Batch.of_images(images, labels, targets, symmetries)

    def sample(self, count: int, seed: int, length: int | None = None) -> Batch:
        """The first images of a stream."""
        return self.batch(seed, range(count))

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless this model can read these images."""
        check_pixels(model, self.size, self.tokens)

    def check_recipe(self, augment: bool, dense: bool) -> None:
        """Drawn images can be mirrored, and their curves are known."""

    def check_shared(self, model: ModelConfig, ranks: int) -> None:
        """Raise ValueError unless this many ranks can share the tokens of an image."""
        check_shared(check_pixels(model, self.size, self.tokens), self.size, self.tokens, ranks)

    def noted(self) -> Self:
        """The same stage: no files are behind it."""
        return self

    def moved(self, folder: str) -> Self:
        """The same stage: no files are behind it."""
        return self

    def reading(self, folder: Path) -> Self:
        """The same stage: no files are behind it."""
        return self

    def of_files(
        self, stages: tuple[AnyStage, ...], folder: Path, level: str | None, split: str | None
    ) -> tuple[AnyStage, ...]:
        """Images in files are one stage, the task itself, in place of the curriculum."""
        return (stage_of_files(folder, self.size, level, split, self.tokens),)
