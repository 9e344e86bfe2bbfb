"""Where a run stands in its curriculum: which stage, how well it goes, and when it gives way to the next.

Contours grow by about a dash a stage: from labels alone a jump, or all lengths mixed from the start, stays at chance.
"""

from dataclasses import dataclass, replace

from sparseflash.train.config import AnyStage, TrainConfig

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
        return replace(begun(config, self.stage + 1, step), evaluated=self.evaluated)


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


def current(config: TrainConfig, progress: Progress) -> AnyStage:
    """The stage itself."""
    return config.stages[progress.stage]
