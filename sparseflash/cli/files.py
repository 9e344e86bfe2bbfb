"""The files that a run was started with, which may have moved."""

import warnings
from pathlib import Path

from sparseflash import pathfinder
from sparseflash.pathfinder import Dataset
from sparseflash.pathfinder.geometry import LEVELS
from sparseflash.patterns.untrusted import check_inside
from sparseflash.train import AnyStage, FolderStage, TrainConfig


def with_files(config: TrainConfig, folder: Path | None, run: Path) -> TrainConfig:
    """A run's recipe, with its files in ``--folder`` or inside the run.

    Runs may be untrusted: files outside the folder of a run are read only if the user names them too.

    Args:
        config: config of the run.
        folder: the folder that the user named.
        run: the run that the user named.

    Raises:
        FileNotFoundError: the folder in the recipe does not exist.
        ValueError: the recipe names a folder outside the run, or the run draws its examples.
    """
    if folder is not None:
        return config.moved(folder)
    for place in map(Path, folders_of(config)):
        if not place.is_dir():
            raise FileNotFoundError(
                f"the files that {run} was started with are no longer in {place}: give their folder by --folder"
            )
        if not _inside(place, run):
            raise ValueError(
                f"{run} was started with files in {place}, outside of it: a run may be untrusted, so give their folder "
                f"by --folder"
            )
    return config


def check_preset(config: TrainConfig, preset: Path, files: bool, weights: bool) -> None:
    """Refuse a preset that names files outside its own folder, because it may be untrusted.

    Args:
        config: the recipe from the preset and the options.
        preset: the file of the preset.
        files: whether the folder of the files comes from the preset, not from the user.
        weights: the same for the initial weights.

    Raises:
        ValueError: such a preset.
    """
    for place in folders_of(config):
        if files and not _inside(Path(place), preset.parent):
            raise ValueError(f"{preset} names files outside of its folder, in {place}: name them by --folder")
    if weights and config.init and not _inside(Path(config.init), preset.parent):
        raise ValueError(f"{preset} names weights outside of its folder, in {config.init}: name them by --init")


def folders_of(config: TrainConfig) -> list[str]:
    """The folders of the examples of a recipe."""
    return [stage.folder for stage in config.stages if stage.folder]


def outside_of(config: TrainConfig, run: Path) -> str | None:
    """The folder that ``--folder`` must name to resume a run, if any."""
    return next((place for place in folders_of(config) if not _inside(Path(place), run)), None)


def _inside(place: Path, folder: Path) -> bool:
    try:
        check_inside(place, folder)
    except ValueError:
        return False
    return True


def image_files(stage: AnyStage) -> FolderStage | None:
    """The stage, if its examples are images in files; otherwise None."""
    return stage if isinstance(stage, FolderStage) else None


def images_of(
    folder: Path, level: str | None, size: int | None, split: str | None, trained: FolderStage | None
) -> tuple[Dataset, str]:
    """The images of ``--folder`` to evaluate a model on, and the name of their split.

    For the files that it was trained on, this is by default the test part of its own split.

    Args:
        folder: a folder in the layout of the Long Range Arena release.
        level: the option.
        size: the option.
        split: the option.
        trained: the stage that the model was trained in, if it is known and has files.

    Raises:
        FileNotFoundError, ValueError: as `sparseflash.pathfinder.read` raises, or an unknown split.
    """
    if trained is None or not _same(trained, folder, level, size):
        chosen = checked_split(split or "all", ("all", "s4", "contiguous"))
        images = pathfinder.read(folder, level, size=size)
        return (images if chosen == "all" else images.split(chosen).test), chosen
    chosen = checked_split(split or "test", ("test", "val", "all", "s4", "contiguous"))
    images = pathfinder.read(folder, trained.level, size=trained.size)
    if chosen in ("test", "val"):
        return getattr(images.split(trained.split), chosen), chosen
    if chosen != trained.split:
        warnings.warn(
            f"the model was trained on most of these images: on the {trained.split} split. --split test is what it has "
            f"not seen",
            stacklevel=2,
        )
    return (images if chosen == "all" else images.split(chosen).test), chosen


def _same(trained: FolderStage, folder: Path, level: str | None, size: int | None) -> bool:
    """Whether a folder holds the files that a stage has noted."""
    if level is not None and (LEVELS[level][0] if level in LEVELS else level) != trained.level:
        return False
    if size not in (None, trained.size):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are read once more, with warnings
        try:
            images = pathfinder.read(folder, trained.level, size=trained.size, verify=False)
        except (FileNotFoundError, ValueError):
            return False
    return (len(images), images.digest()) == (trained.examples, trained.digest)


def reading(stage: AnyStage, folder: Path) -> AnyStage:
    """A stage with the files of ``--folder``; warns if the model was trained on others."""
    found = stage.reading(folder)
    if stage.digest and found.digest != stage.digest:
        warnings.warn(
            f"{folder} does not hold the files that the model was trained on: {found.examples:,} examples, "
            f"{stage.examples:,} then",
            stacklevel=2,
        )
    return found


def checked_split(split: str, known: tuple[str, ...]) -> str:
    """The value of ``--split``.

    Raises:
        ValueError: an unknown split.
    """
    if split not in known:
        raise ValueError(f"--split must be {', '.join(known[:-1])} or {known[-1]}; got {split!r}")
    return split
