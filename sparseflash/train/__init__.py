"""Training on Pathfinder images, drawn on the fly or from files, and on the other tasks of the Long Range Arena."""

import warnings
from typing import TYPE_CHECKING, Any

from sparseflash.train.config import TrainConfig
from sparseflash.train.curriculum import Progress
from sparseflash.train.data import DataShard
from sparseflash.train.evaluate import Score, evaluate, held_out, stored_images
from sparseflash.train.folder_stage import FolderStage
from sparseflash.train.image_stage import Stage
from sparseflash.train.loop import TrainResult, train
from sparseflash.train.sequences import SequenceStage
from sparseflash.train.stage import AnyStage
from sparseflash.train.tasks import PRESETS, TASKS, Preset, load_preset, recipe

__all__ = [
    "PRESETS",
    "TASKS",
    "AnyStage",
    "DataShard",
    "FolderStage",
    "Preset",
    "Progress",
    "Score",
    "SequenceStage",
    "Stage",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "held_out",
    "load_preset",
    "recipe",
    "stored_images",
    "train",
]

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """The former name of `DataShard`."""
        if name != "Stream":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        warnings.warn(f"{__name__}.Stream is now {__name__}.DataShard", DeprecationWarning, stacklevel=2)
        return DataShard
