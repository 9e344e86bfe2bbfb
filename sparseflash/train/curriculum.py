"""Where a run stands in its curriculum: which stage, how well it goes, and when it gives way to the next.

Contours grow by about a dash a stage: from labels alone a jump, or all lengths mixed from the start, stays at chance.
"""

from dataclasses import dataclass, replace

from sparseflash.train.config import TrainConfig
from sparseflash.train.stage import AnyStage

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
        evaluated: the step at which the model was last evaluated on validation examples; 0 before the first time.
        best: the best accuracy on those of this stage.
        best_step: the step at which that was; 0 before the first time in this stage.
        waited: evaluations since.

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
        """A place at the beginning of a stage, where a model can but guess."""
        return cls(stage, step, accuracy=config.chance)

    def current(self, config: TrainConfig) -> AnyStage:
        """The stage itself."""
        return config.stages[self.stage]

    def last_stage_since(self, config: TrainConfig) -> int | None:
        """The step at which the last stage began; None before that."""
        return self.since if self.stage == len(config.stages) - 1 else None

    def last_step(self, config: TrainConfig, steps: int | None) -> int | None:
        """The step at which training ends, as far as it is known: after ``steps``, or with the schedule."""
        if steps is not None:
            return steps
        since = self.last_stage_since(config)
        return None if since is None else since + config.schedule_steps

    def counted(self, config: TrainConfig, step: int, accuracies: list[float], images: int) -> "Progress":
        """The place after the parts of a step; reviews of the stage before do not count."""
        place = self
        for number, accuracy in enumerate(accuracies, start=step * config.accumulate):
            if config.drawn_from(number, place.stage) == place.stage:
                place = place.after(accuracy, images)
        return place

    def after(self, accuracy: float, images: int) -> "Progress":
        """The place once so many more images of this stage were answered so well."""
        share = min(1.0, images / IMAGES)
        seen = self.images + images
        return replace(self, images=seen, accuracy=self.accuracy + share * (accuracy - self.accuracy))

    def validated(self, accuracy: float, step: int) -> "Progress":
        """The place once so large a share of the validation examples was right at a step."""
        if accuracy > self.best or not self.best_step:
            return replace(self, evaluated=step, best=accuracy, best_step=step, waited=0)
        return replace(self, evaluated=step, waited=self.waited + 1)

    def evaluation_due(self, config: TrainConfig, step: int) -> bool:
        """Whether the model is to be evaluated now, and has not been."""
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
