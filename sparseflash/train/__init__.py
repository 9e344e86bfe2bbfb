"""Training on Pathfinder images drawn on the fly."""

from sparseflash.train.config import Stage, TrainConfig
from sparseflash.train.data import stream
from sparseflash.train.evaluate import Score, evaluate, fresh_images, stored_images
from sparseflash.train.loop import TrainResult, train
from sparseflash.train.tasks import TASKS, Task, recipe

__all__ = [
    "TASKS",
    "Score",
    "Stage",
    "Task",
    "TrainConfig",
    "TrainResult",
    "evaluate",
    "fresh_images",
    "recipe",
    "stored_images",
    "stream",
    "train",
]
