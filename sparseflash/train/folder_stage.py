"""A stage whose Pathfinder images are files: the Long Range Arena release, or what `sparseflash generate` wrote."""

import os
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from sparseflash import pathfinder
from sparseflash.models import ModelConfig, PixelTransformerConfig
from sparseflash.models.auto import pixel_config
from sparseflash.models.config import TOKENS
from sparseflash.models.sharing import check_shared
from sparseflash.pathfinder import Dataset, Splits
from sparseflash.pathfinder.folders import HARD, level_folder
from sparseflash.pathfinder.geometry import LEVELS, LRA_SIZES, SIZES
from sparseflash.pathfinder.metadata import metadata_files
from sparseflash.patterns.shown import shown
from sparseflash.train.baseline import files_baseline
from sparseflash.train.batch import Batch
from sparseflash.train.stage import AnyStage

DISTANCE = "the distance between the discs alone"


@dataclass(frozen=True)
class FolderStage:
    """The images of one level of one size, and how they are split.

    Attributes:
        folder: what `sparseflash.pathfinder.read` takes: the release, a part of it, or a folder in its layout.
        size: side of the images.
        level: name of the level folder; easy, intermediate and hard are understood.
        split: ``"s4"`` (hard level only) or ``"contiguous"``, see `sparseflash.pathfinder.Dataset.split`.
        tokens: which pixels are tokens; None for what the model's config says.
        examples: number of images, once `noted`; 0 before.
        digest: digest of the files, once `noted`; empty before.

    Raises:
        ValueError: an unknown split, s4 of another level, or unknown tokens.

    Example:
        >>> FolderStage("lra_release", 128, level="easy", split="contiguous").level
        'curv_baseline'
    """

    folder: str
    size: int
    level: str = HARD
    split: str = "s4"
    tokens: str | None = None
    examples: int = 0
    digest: str = ""

    length: ClassVar[None] = None
    noun: ClassVar[str] = "images"
    figures: ClassVar[tuple[str, ...]] = ("mistakes",)  # files do not contain the positions of the discs
    drawn: ClassVar[bool] = False
    baseline: ClassVar[None] = None

    def __post_init__(self) -> None:
        if self.level in LEVELS:
            object.__setattr__(self, "level", LEVELS[self.level][0])
        if not 1 <= self.size <= SIZES[-1]:
            raise ValueError(f"a folder's size must be 1 to {SIZES[-1]:,} pixels; got {self.size!r}")
        if self.split not in ("s4", "contiguous"):
            raise ValueError(f"a folder's split must be s4 or contiguous; got {self.split!r}")
        if self.split == "s4" and self.level != HARD:
            raise ValueError(f"the s4 split is of the hard level alone, this is {self.level}: use the split contiguous")
        check_tokens(self.tokens)

    def __str__(self) -> str:
        level = next((level for level, (name, _) in LEVELS.items() if name == self.level), self.level)
        return f"{self.size} px, {shown(level)}, {self.split} split of {shown(self.folder)}"

    @property
    def rule(self) -> str:
        """The baseline of the images; chance if their distribution is unknown."""
        known = self.size in LRA_SIZES and self.level in [name for name, _ in LEVELS.values()]
        return DISTANCE if known or (self._level() / "generator.json").is_file() else "guessing"

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the model besides the images."""
        return {"tokens": self.tokens}

    @property
    def tokens_each(self) -> int:
        """Tokens of an example, if all pixels are."""
        return self.size**2

    @property
    def splits(self) -> dict[str, range]:
        """The sets, each a range of indices; opens the folder."""
        return _ranges(self._parts())

    def known_baseline(self) -> float:
        """Accuracy by the distance of the markers, or chance if the distribution of the images is unknown."""
        return files_baseline(self.folder, self.level, self.size)

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless this model can read these images."""
        check_pixels(model, self.size, self.tokens)

    def check_recipe(self, augment: bool, dense: bool) -> None:
        """Raise ValueError for a dense loss, which needs curves that files do not contain."""
        if dense:
            raise ValueError("a dense loss needs the curves of images that are drawn; of files use dense_weight=0")

    def check_shared(self, model: ModelConfig, ranks: int) -> None:
        """Raise ValueError unless this many ranks can share the tokens of an image."""
        check_shared(check_pixels(model, self.size, self.tokens), self.size, self.tokens, ranks)

    def noted(self) -> Self:
        """The same stage with the number and the digest of its files, all of which are read.

        Raises:
            FileNotFoundError: no such folder, or images are missing.
            ValueError: damaged files, no image to train on, or other files than noted before.
        """
        data = pathfinder.read(self.folder, self.level, size=self.size)
        found = replace(self, examples=len(data), digest=data.digest())
        if self.digest and (found.examples, found.digest) != (self.examples, self.digest):
            raise ValueError(other_files(self.folder, self.examples, found.examples))
        if not found.splits["train"]:
            raise ValueError(f"{data.folder} has {len(data)} images, too few to split into training and test parts")
        return found

    def moved(self, folder: str) -> Self:
        """The same stage for files that are now in another folder; nothing is read."""
        return replace(self, folder=folder)

    def reading(self, folder: Path) -> Self:
        """The same stage, noted for the files in a folder; raises like `noted`."""
        return replace(self, folder=str(folder.resolve()), examples=0, digest="").noted()

    def of_files(
        self, stages: tuple[AnyStage, ...], folder: Path, level: str | None, split: str | None
    ) -> tuple[AnyStage, ...]:
        """Images in files are one stage, the task itself, in place of the curriculum."""
        return (stage_of_files(folder, self.size, level, split, self.tokens),)

    def batch(
        self,
        seed: int,
        indices: NDArray[np.int64] | range,
        dense: bool = False,
        symmetries: NDArray[np.int64] | None = None,
    ) -> Batch:
        """Images of indices in `splits`, without ground truth; files have no seed."""
        return Batch.of_images(*self.draw(indices), symmetries=symmetries)

    def sample(self, count: int, seed: int, length: int | None = None) -> Batch:
        """The first images; files have no others."""
        return self.batch(seed, range(count))

    def draw(self, indices: NDArray[np.int64] | range) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Images uint8 [B, H, H] and labels int64 [B] of indices in `splits`."""
        parts = self._parts()
        sets = list(zip(parts, _ranges(parts).values(), strict=True))
        found = [part[int(index) - places.start] for index in indices for part, places in sets if index in places]
        return np.stack([image for image, _ in found]), np.array([label for _, label in found], np.int64)

    def _level(self) -> Path:
        return level_folder(self.folder, self.level, self.size)

    def _parts(self) -> Splits:
        folder = self._level()
        parts = _opened(folder, self.split, self.size, _stamp(folder))
        count = sum(map(len, parts))
        if self.digest and count != self.examples:
            raise ValueError(other_files(self.folder, self.examples, count))
        return parts


def check_tokens(tokens: str | None) -> None:
    """Raise ValueError unless these are tokens that a stage may name."""
    if tokens is not None and tokens not in TOKENS:
        raise ValueError(f"a stage's tokens must be one of {', '.join(TOKENS)}; got {tokens!r}")


def check_pixels(model: ModelConfig, size: int, tokens: str | None) -> PixelTransformerConfig:
    """The config of a model that can read images of this size with these tokens; raise ValueError for any other."""
    pixels = pixel_config(model, "images need a model over pixels; this one is over symbols")
    if tokens is not None:
        replace(pixels, tokens=tokens)
    pixels.grid((size, size))
    return pixels


def stage_of_files(folder: Path, size: int, level: str | None, split: str | None, tokens: str | None) -> FolderStage:
    """The stage of images in a folder, with defaults for omitted arguments.

    Args:
        folder: an absolute path.
        size: side of the images.
        level: by default hard, or the folder's level.
        split: by default s4 for the hard level, otherwise contiguous.
        tokens: which pixels are tokens.
    """
    if level is None:
        level = folder.name if folder.name.startswith("curv_") else "hard"
    name = LEVELS[level][0] if level in LEVELS else level
    if split is None:
        split = "s4" if name == LEVELS["hard"][0] else "contiguous"
    return FolderStage(str(folder), size, level, split, tokens)


def other_files(folder: str, noted: int, found: int) -> str:
    """The message for files that differ from those that a run started with."""
    counts = "as many, but not the same" if noted == found else f"{found:,} examples, not {noted:,}"
    return f"{shown(folder)} does not hold the files that the run began with: {counts}"


def _ranges(parts: Splits) -> dict[str, range]:
    sets, first = dict[str, range](), 0
    for name, part in parts._asdict().items():
        sets[name] = range(first, first := first + len(part))
    return sets


def _stamp(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """A stamp that changes with the metadata; images are read again each time."""
    found = ((file.name, os.stat(file)) for file in metadata_files(folder))
    return tuple((name, status.st_size, status.st_mtime_ns) for name, status in found)


@lru_cache(maxsize=4)
def _opened(folder: Path, split: str, size: int, stamp: object) -> Splits:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `noted` has warned already
        data: Dataset = pathfinder.read(folder, size=size, verify=False)
    return data.split(split)
