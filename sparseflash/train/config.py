"""Everything that decides the numbers of a training run, as data; a checkpoint carries it, so it resumes by itself."""

import dataclasses
import json
import math
from typing import Any, Self

from sparseflash.models.config import TOKENS, PixelTransformerConfig, of_kinds
from sparseflash.pathfinder import Geometry

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

    def __str__(self) -> str:
        return f"{self.geometry.size} px, {self.geometry.contour_length} dashes"

    def __post_init__(self) -> None:
        if self.tokens is not None and self.tokens not in TOKENS:
            raise ValueError(f"a stage's tokens must be one of {', '.join(TOKENS)}; got {self.tokens!r}")


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
        init: a folder with the weights to begin with, of a model of the same shape; empty for random ones. A checkpoint
            carries its weights, so resuming does not need the folder.
        first_stage: number of the stage to begin with, from 0.
        seed: of the weights, of the order of images and of fresh ones.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        activation_checkpointing: recompute activations in the backward, for less memory and more time.

    Raises:
        ValueError: a field out of range.
    """

    task: str
    model: PixelTransformerConfig
    stages: tuple[Stage, ...]
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kinds = _KINDS.get(field.type)
            if kinds and type(getattr(self, field.name)) not in kinds:
                raise ValueError(f"{field.name} must be {kinds[0].__name__}; got {getattr(self, field.name)!r}")
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
        if not 0.5 < self.promote_at <= 1:
            raise ValueError(f"promote_at must be above 0.5 and at most 1; got {self.promote_at!r}")
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
            if stage.tokens is not None:
                dataclasses.replace(self.model, tokens=stage.tokens)
            self.model.grid((stage.geometry.size, stage.geometry.size))
        if bool(self.dense_weight) != bool(self.model.dense_classes):
            raise ValueError(
                f"a dense loss needs a dense head and the reverse; got dense_weight={self.dense_weight!r} and "
                f"dense_classes={self.model.dense_classes!r}"
            )

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
            fields["model"] = PixelTransformerConfig.from_dict(fields["model"])
            fields["stages"] = tuple(
                Stage(**of_kinds(Stage, {**stage, "geometry": Geometry(**of_kinds(Geometry, stage["geometry"]))}))
                for stage in fields["stages"]
            )
            return cls(**of_kinds(cls, fields))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a training config of this version: {error}") from None

    def differences(self, other: "TrainConfig") -> list[str]:
        """Names of the fields in which two configs differ."""
        mine, theirs = (json.loads(json.dumps(config.to_dict())) for config in (self, other))
        return [name for name in mine if mine[name] != theirs[name]]
