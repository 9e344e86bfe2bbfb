"""Everything that decides the numbers of a training run, as data; a checkpoint carries it, so it resumes by itself."""

import dataclasses
import json
import math
from typing import Any, ClassVar, Self

from sparseflash.foreign import of_kinds
from sparseflash.imports import checked
from sparseflash.models import ModelConfig, PixelTransformerConfig, config_from
from sparseflash.models.config import TOKENS
from sparseflash.pathfinder import Geometry
from sparseflash.train.sequences import SequenceStage, sequence_stage_from

PRECISIONS = ("fp32", "bf16")
DATA = ("fixed", "fresh")
_KINDS: dict[Any, tuple[type, ...]] = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a curriculum: which images, and how the model reads them.

    Attributes:
        geometry: the distribution of the images.
        match_distance: labels tell nothing about the distance of the two markers, see `sparseflash.pathfinder`.
        tokens: which pixels are tokens in this stage, where it is not what the model's config says.
        baseline: accuracy of the best rule that looks at nothing but the distance of the two markers, if known.
    """

    geometry: Geometry
    match_distance: bool = False
    tokens: str | None = None
    baseline: float | None = None

    rule: ClassVar[str] = "the distance between the discs alone"

    def __str__(self) -> str:
        return f"{self.geometry.size} px, {self.geometry.contour_length} dashes"

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens not in TOKENS:
            raise ValueError(f"a stage's tokens must be one of {', '.join(TOKENS)}; got {self.tokens!r}")

    @property
    def options(self) -> dict[str, Any]:
        """What a model is told beside the images."""
        return {"tokens": self.tokens}

    def check(self, model: ModelConfig) -> None:
        """Raise ValueError unless this model can read these images."""
        if not isinstance(model, PixelTransformerConfig):
            raise ValueError("images need a model over pixels; this one is over symbols")
        if self.tokens is not None:
            dataclasses.replace(model, tokens=self.tokens)
        model.grid((self.geometry.size, self.geometry.size))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe: model, data and optimisation.

    Attributes:
        task: name of the task, for people.
        model: shape of the model.
        stages: the curriculum, in order; a single stage is no curriculum.
        schedule_steps: optimizer steps of the last stage over which the learning rate falls. Training may stop earlier
            and resume; past it the learning rate stays at its floor.
        promote_at: running accuracy (over about 1,000 images) at which a stage gives way to the next.
        review: every so many-th batch is drawn from the stage before; 0 for none.
        data: ``"fixed"``: the 160,000 training images of each stage, shuffled anew each time round; ``"fresh"``: images
            without end, each seen once. Neither ever meets the validation and test images.
        augment: each image is mirrored and transposed at random.
        batch: images in one forward pass of one process.
        accumulate: forward passes for one optimizer step.
        lr: peak learning rate.
        final_lr: the floor, as a share of the peak.
        warmup: steps of linear warm-up.
        weight_decay: of matrices; norms, biases and the grey-value embedding have none.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the weights, which is what a checkpoint's model then is; 0 for none.
        dense_weight: weight of the dense loss (every lit pixel predicts how many markers lie on its curve, from the
            generator's ground truth); 0 trains from labels alone.
        init: a folder with the weights to begin with, of a model of the same shape or of fewer layers, which are then
            copied side by side: 6 become 10 as 0 1 1 2 2 3 3 4 4 5; empty for random ones. A checkpoint carries its
            weights, so resuming does not need the folder.
        first_stage: number of the stage to begin with, from 0.
        seed: of the weights, of the order of images and of fresh ones.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        activation_checkpointing: recompute activations in the backward, for less memory and more time.
        imports: names of the modules that register the patterns, where they are the user's own. They are data: whoever
            goes on from a checkpoint imports them himself.

    Raises:
        ValueError: a field out of range.
    """

    task: str
    model: ModelConfig
    stages: tuple[Stage | SequenceStage, ...]
    schedule_steps: int
    promote_at: float = 0.91
    review: int = 3
    data: str = "fixed"
    augment: bool = False
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    final_lr: float = 0.02
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0
    ema: float = 0.0
    dense_weight: float = 0.0
    init: str = ""
    first_stage: int = 0
    seed: int = 0
    precision: str = "fp32"
    activation_checkpointing: bool = False
    imports: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kinds = _KINDS.get(field.type)
            if kinds and type(getattr(self, field.name)) not in kinds:
                raise ValueError(f"{field.name} must be {kinds[0].__name__}; got {getattr(self, field.name)!r}")
        object.__setattr__(self, "imports", checked(self.imports))
        for name, least in (("schedule_steps", 1), ("batch", 1), ("accumulate", 1), ("warmup", 0), ("seed", 0)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value!r}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a positive number; got {value!r}")
        for name in ("weight_decay", "dense_weight", "final_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 0 or a positive number; got {value!r}")
        for name, known in (("precision", PRECISIONS), ("data", DATA)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not self.chance < self.promote_at <= 1:
            raise ValueError(
                f"promote_at must be above {self.chance:.3g}, which is chance, and at most 1; got {self.promote_at!r}"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in 0..1, 1 excluded; got {self.ema!r}")
        if self.review < 0 or self.review == 1:
            raise ValueError(f"review must be 0, or at least 2; got {self.review!r}")
        if not self.stages:
            raise ValueError("stages must have at least one stage; got none")
        if not 0 <= self.first_stage < len(self.stages):
            raise ValueError(
                f"first_stage must be one of the {len(self.stages)} stages, from 0; got {self.first_stage!r}"
            )
        for stage in self.stages:
            stage.check(self.model)
        self._check_data()

    def _check_data(self) -> None:
        dense_classes = self.model.dense_classes if isinstance(self.model, PixelTransformerConfig) else 0
        if bool(self.dense_weight) != bool(dense_classes):
            raise ValueError(
                f"a dense loss needs a dense head and the reverse; got dense_weight={self.dense_weight!r} and "
                f"dense_classes={dense_classes!r}"
            )
        for stage in self.stages:
            if isinstance(stage, SequenceStage) and self.augment:
                raise ValueError("augment mirrors images; sequences have no such symmetry")
            if isinstance(stage, SequenceStage) and self.data == "fresh" and not stage.drawn:
                raise ValueError('data "fresh" has no end, and files do; use "fixed"')

    @property
    def pixel_model(self) -> PixelTransformerConfig:
        """The model of a task over pixels.

        Raises:
            ValueError: the task is over symbols.
        """
        if not isinstance(self.model, PixelTransformerConfig):
            raise ValueError(f"the task {self.task} is over symbols, not over pixels")
        return self.model

    @property
    def pixel_stages(self) -> tuple[Stage, ...]:
        """The stages of a task over pixels; raises as `pixel_model` does."""
        assert self.pixel_model
        return tuple(stage for stage in self.stages if isinstance(stage, Stage))

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.model.classes

    def learning_rate(self, step: int, last_stage_since: int | None = 0) -> float:
        """Linear warm-up, the peak, and once the last stage has begun a cosine from `lr` to `final_lr * lr`.

        Args:
            step: optimizer steps done.
            last_stage_since: the step at which the last stage began; None before that.
        """
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        done = 0 if last_stage_since is None else step - last_stage_since
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, done / self.schedule_steps)))
        return self.lr * warm * (self.final_lr + (1 - self.final_lr) * falling)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """The config that `to_dict` described, also after a trip through JSON.

        Raises:
            ValueError: fields are missing, unknown or out of range.
        """
        try:
            fields = dict(fields)
            fields["model"] = config_from(fields["model"])
            fields["stages"] = tuple(map(_stage_from, fields["stages"]))
            return cls(**of_kinds(cls, fields))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a training config of this version: {error}") from None

    def differences(self, other: "TrainConfig") -> list[str]:
        """Names of the fields in which two configs differ."""
        mine, theirs = (json.loads(json.dumps(config.to_dict())) for config in (self, other))
        return [name for name in mine if mine[name] != theirs[name]]


def _stage_from(fields: dict[str, Any]) -> Stage | SequenceStage:
    if "geometry" not in fields:
        return sequence_stage_from(fields)
    return Stage(**of_kinds(Stage, {**fields, "geometry": Geometry(**of_kinds(Geometry, fields["geometry"]))}))
