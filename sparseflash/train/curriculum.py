"""Where a run stands in its curriculum: which stage, how well it goes, and when it gives way to the next.

Contours grow by about a dash a stage: from labels alone a jump, or all lengths mixed from the start, stays at chance.
"""

from dataclasses import dataclass, replace

from sparseflash.train.config import Stage, TrainConfig
from sparseflash.train.sequences import SequenceStage

# The running accuracy is a mean over about so many images; a stage gives way no sooner.
IMAGES = 1_000
CHANCE = 0.5


@dataclass(frozen=True)
class Progress:
    """A place in a curriculum.

    Attributes:
        stage: number of the stage, from 0.
        since: the step at which it began.
        images: images of this stage seen, reviews of the stage before not counted.
        accuracy: running accuracy on them; chance to begin with.

    Example:
        >>> Progress().after(0.75, images=100).accuracy
        0.525
    """

    stage: int = 0
    since: int = 0
    images: int = 0
    accuracy: float = CHANCE

    def after(self, accuracy: float, images: int) -> "Progress":
        """The place once so many more images of this stage were answered so well."""
        share = min(1.0, images / IMAGES)
        seen = self.images + images
        return replace(self, images=seen, accuracy=self.accuracy + share * (accuracy - self.accuracy))

    def promoted(self, config: TrainConfig, step: int) -> "Progress":
        """The next stage, if this one is done and not the last; else the same place."""
        done = self.images >= IMAGES and self.accuracy >= config.promote_at
        return begun(config, self.stage + 1, step) if done and self.stage + 1 < len(config.stages) else self


def begun(config: TrainConfig, stage: int, step: int = 0) -> Progress:
    """A place at the beginning of a stage, where a model can but guess."""
    return Progress(stage, step, accuracy=config.chance)


def drawn_from(config: TrainConfig, part: int, stage: int) -> int:
    """The number of the stage that the images of a part come from: this one, or for review the one before."""
    review = config.review and part % config.review == config.review - 1
    return stage - 1 if review and stage else stage


def last_stage_since(config: TrainConfig, progress: Progress) -> int | None:
    """The step at which the last stage began; None before that."""
    return progress.since if progress.stage == len(config.stages) - 1 else None


def current(config: TrainConfig, progress: Progress) -> Stage | SequenceStage:
    """The stage itself."""
    return config.stages[progress.stage]
