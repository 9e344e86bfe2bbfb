"""Everything that decides the numbers of a training run, as data; a checkpoint carries it, so it resumes by itself."""

import dataclasses
import json
import math
from typing import Any, Self

from sparseflash.models.config import PixelTransformerConfig
from sparseflash.pathfinder import Geometry

PRECISIONS = ("fp32", "bf16")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage of a curriculum: which images, and until when.

    Attributes:
        geometry: the distribution of the images.
        until: the stage ends at this share of the schedule; 1 for the last stage.
        match_distance: labels tell nothing about the distance of the two markers, see `sparseflash.pathfinder`.
    """

    geometry: Geometry
    until: float = 1.0
    match_distance: bool = False


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe: model, data and optimisation.

    Attributes:
        task: name of the task, for people.
        model: shape of the model.
        stages: the curriculum, in order; a single stage is no curriculum.
        schedule_steps: optimizer steps over which the learning rate falls and the stages pass. Training may stop
            earlier and resume; past it the learning rate stays at its floor.
        batch: images in one forward pass of one process.
        accumulate: forward passes for one optimizer step.
        lr: peak learning rate.
        final_lr: the floor, as a share of the peak.
        warmup: steps of linear warm-up.
        weight_decay: of matrices; norms, biases and the grey-value embedding have none.
        clip: largest norm of the gradient.
        dense_weight: weight of the dense loss (every lit pixel predicts how many markers lie on its curve, from the
            generator's ground truth); 0 trains from labels alone.
        seed: of the weights and of the images.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        activation_checkpointing: recompute activations in the backward, for less memory and more time.

    Raises:
        ValueError: a field out of range.
    """

    task: str
    model: PixelTransformerConfig
    stages: tuple[Stage, ...]
    schedule_steps: int
    batch: int = 32
    accumulate: int = 1
    lr: float = 1e-3
    final_lr: float = 0.02
    warmup: int = 30
    weight_decay: float = 0.01
    clip: float = 1.0
    dense_weight: float = 0.0
    seed: int = 0
    precision: str = "fp32"
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
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
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        ends = [stage.until for stage in self.stages]
        if not ends or ends != sorted(set(ends)) or ends[0] <= 0 or ends[-1] != 1:
            raise ValueError(f"stages must end at growing shares of the schedule, the last at 1; got {ends}")
        if bool(self.dense_weight) != bool(self.model.dense_classes):
            raise ValueError(
                f"a dense loss needs a dense head and the reverse; got dense_weight={self.dense_weight!r} and "
                f"dense_classes={self.model.dense_classes!r}"
            )

    def stage(self, step: int) -> Stage:
        """The stage that a step belongs to."""
        return next((stage for stage in self.stages if step < stage.until * self.schedule_steps), self.stages[-1])

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then a cosine from `lr` to `final_lr * lr`."""
        warm = min(1.0, (step + 1) / (self.warmup + 1))
        falling = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.schedule_steps)))
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
                Stage(**{**stage, "geometry": Geometry(**stage["geometry"])}) for stage in fields["stages"]
            )
            return cls(**fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a training config of this version: {error}") from None

    def differences(self, other: "TrainConfig") -> list[str]:
        """Names of the fields in which two configs differ."""
        mine, theirs = (json.loads(json.dumps(config.to_dict())) for config in (self, other))
        return [name for name in mine if mine[name] != theirs[name]]
