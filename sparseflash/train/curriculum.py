"""The position of a run in its curriculum: the stage, its accuracy, and when the next stage begins.

Contours grow by about one dash per stage. With a larger jump, or all lengths mixed from the start, training from labels
alone stays at chance.
"""

from dataclasses import dataclass, replace

from sparseflash.train.config import TrainConfig
from sparseflash.train.stage import AnyStage

# The running accuracy is a mean over about this many images; no stage ends sooner.
IMAGES = 1_000
CHANCE = 0.5


@dataclass(frozen=True)
class Progress:
    """A position in a curriculum.

    Attributes:
        stage: number of the stage, from 0.
        since: the step at which the stage began.
        images: number of images of this stage seen, without reviews of the stage before.
        accuracy: running accuracy on these images, initially chance.
        evaluated: the step of the last evaluation on validation examples; 0 before the first one.
        best: best validation accuracy in this stage.
        best_step: the step of the best evaluation; 0 before the first one in this stage.
        waited: number of evaluations since the best one.

    Example:
        >>> Progress().after(0.75, images=100).accuracy
        0.525
    """

    stage: int = 0
    since: int = 0
    images: int = 0
    accuracy: float = CHANCE
    evaluated: int = 0
    best: float = 0.0
    best_step: int = 0
    waited: int = 0

    @classmethod
    def begun(cls, config: TrainConfig, stage: int, step: int = 0) -> "Progress":
        """The position at the beginning of a stage, with accuracy at chance."""
        return cls(stage, step, accuracy=config.chance)

    def current(self, config: TrainConfig) -> AnyStage:
        """The stage itself."""
        return config.stages[self.stage]

    def last_stage_since(self, config: TrainConfig) -> int | None:
        """The step at which the last stage began; None before that."""
        return self.since if self.stage == len(config.stages) - 1 else None

    def last_step(self, config: TrainConfig, steps: int | None) -> int | None:
        """The step at which training ends: after ``steps``, or with the schedule; None if unknown."""
        if steps is not None:
            return steps
        since = self.last_stage_since(config)
        return None if since is None else since + config.schedule_steps

    def counted(self, config: TrainConfig, step: int, accuracies: list[float], images: int) -> "Progress":
        """The position after the global batches of a step; reviews of the stage before do not count."""
        place = self
        for number, accuracy in enumerate(accuracies, start=step * config.accumulate):
            if config.drawn_from(number, place.stage) == place.stage:
                place = place.after(accuracy, images)
        return place

    def after(self, accuracy: float, images: int) -> "Progress":
        """The position after more images of this stage, answered with this accuracy."""
        share = min(1.0, images / IMAGES)
        seen = self.images + images
        return replace(self, images=seen, accuracy=self.accuracy + share * (accuracy - self.accuracy))

    def validated(self, accuracy: float, step: int) -> "Progress":
        """The position after an evaluation with this validation accuracy."""
        if accuracy > self.best or not self.best_step:
            return replace(self, evaluated=step, best=accuracy, best_step=step, waited=0)
        return replace(self, evaluated=step, waited=self.waited + 1)

    def evaluation_due(self, config: TrainConfig, step: int) -> bool:
        """Whether an evaluation is due and has not been done."""
        return config.eval_every > 0 and step > self.evaluated and step % config.eval_every == 0

    def exhausted(self, config: TrainConfig) -> bool:
        """Whether patience has run out."""
        return 0 < config.patience <= self.waited

    def promoted(self, config: TrainConfig, step: int) -> "Progress":
        """The next stage, if this one is done and not the last; else the same place."""
        done = self.images >= IMAGES and self.accuracy >= config.promote_at
        if not done or self.stage + 1 == len(config.stages):
            return self
        return replace(Progress.begun(config, self.stage + 1, step), evaluated=self.evaluated)
