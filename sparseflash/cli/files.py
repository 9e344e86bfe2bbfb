"""The files that a run was begun with, which may lie elsewhere by now."""

import warnings
from pathlib import Path

from sparseflash import pathfinder
from sparseflash.pathfinder import Dataset
from sparseflash.pathfinder.geometry import LEVELS
from sparseflash.patterns.untrusted import check_inside
from sparseflash.train import AnyStage, FolderStage, TrainConfig


def with_files(config: TrainConfig, folder: Path | None, run: Path) -> TrainConfig:
    """A run's recipe, its files being where ``--folder`` says, or inside the run.

    Runs are handed on: what somebody else's names outside of its folder is read when the user names it too, and not
    before.

    Args:
        config: of the run.
        folder: as named by the user.
        run: the run, as named by the user.

    Raises:
        FileNotFoundError: the folder that the recipe knows is not there.
        ValueError: the recipe knows a folder outside of the run, or the run draws its examples.
    """
    if folder is not None:
        return config.moved(folder)
    for place in map(Path, folders_of(config)):
        if not place.is_dir():
            raise FileNotFoundError(
                f"the files that {run} was begun with are no longer in {place}: say where they are by --folder"
            )
        if not _inside(place, run):
            raise ValueError(
                f"{run} was begun with files in {place}, outside of it: a run may be somebody else's, so say by "
                f"--folder where they are"
            )
    return config


def check_preset(config: TrainConfig, preset: Path, files: bool, weights: bool) -> None:
    """Refuse a preset that names files outside of its own folder: it may be somebody else's.

    Args:
        config: what the preset and the options of the command line make.
        preset: its file.
        files: the folder of the files is the preset's choice, not the user's.
        weights: those to begin with are.

    Raises:
        ValueError: such a preset.
    """
    for place in folders_of(config):
        if files and not _inside(Path(place), preset.parent):
            raise ValueError(f"{preset} names files outside of its folder, in {place}: name them by --folder")
    if weights and config.init and not _inside(Path(config.init), preset.parent):
        raise ValueError(f"{preset} names weights outside of its folder, in {config.init}: name them by --init")


def folders_of(config: TrainConfig) -> list[str]:
    """The folders that a recipe reads its examples from."""
    return [stage.folder for stage in config.stages if stage.folder]


def outside_of(config: TrainConfig, run: Path) -> str | None:
    """The folder that ``--folder`` must name when a run goes on, if any."""
    return next((place for place in folders_of(config) if not _inside(Path(place), run)), None)


def _inside(place: Path, folder: Path) -> bool:
    try:
        check_inside(place, folder)
    except ValueError:
        return False
    return True


def image_files(stage: AnyStage) -> FolderStage | None:
    """The stage, if its examples are images in files; None of any other."""
    return stage if isinstance(stage, FolderStage) else None


def images_of(
    folder: Path, level: str | None, size: int | None, split: str | None, trained: FolderStage | None
) -> tuple[Dataset, str]:
    """The images of ``--folder`` that a model is to be scored on, and the name of their split.

    Where these are the files that it was trained on, it is the test part of its own split, if nothing else is said.

    Args:
        folder: in the layout of the Long Range Arena release.
        level: as given.
        size: as given.
        split: as given.
        trained: the stage that the model was trained in, if it is known and is of files.

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
        warnings.simplefilter("ignore")  # they are read once more, and told then
        try:
            images = pathfinder.read(folder, trained.level, size=trained.size, verify=False)
        except (FileNotFoundError, ValueError):
            return False
    return (len(images), images.digest()) == (trained.examples, trained.digest)


def reading(stage: AnyStage, folder: Path) -> AnyStage:
    """A stage with the files of ``--folder``; a warning says if the model was trained on others."""
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
        ValueError: it is none of those known.
    """
    if split not in known:
        raise ValueError(f"--split must be {', '.join(known[:-1])} or {known[-1]}; got {split!r}")
    return split
