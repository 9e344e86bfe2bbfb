"""The recipe of a training run, as data. A checkpoint contains it, so no other file is needed to resume."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Self, cast

from sparseflash.models import ModelConfig, PixelTransformerConfig, config_from
from sparseflash.models.auto import pixel_config
from sparseflash.pathfinder import Geometry
from sparseflash.patterns.shown import shown
from sparseflash.train.folder_stage import FolderStage
from sparseflash.train.image_stage import Stage
from sparseflash.train.sequences import sequence_stage_from
from sparseflash.train.stage import AnyStage
from sparseflash.utils.imports import checked
from sparseflash.utils.untrusted import check_field_types

PRECISIONS = ("fp32", "bf16")
DATA = ("fixed", "fresh")
# Recipes may be untrusted, so counts are bounded before anything is allocated.
MOST_BATCH = 1 << 18
_COUNTS = {
    "schedule_steps": (1, 1 << 40), "batch": (1, MOST_BATCH), "accumulate": (1, MOST_BATCH), "warmup": (0, 1 << 40),
    "seed": (0, (1 << 63) - 1), "eval_every": (0, 1 << 40), "eval_examples": (1, 1 << 32), "patience": (0, 1 << 40),
}  # fmt: skip
_MOST_STAGES = 1000
_MOST_TOKENS = 1 << 30  # per batch: pixels, or tokens of its longest documents
_MOST_WEIGHTS = 1 << 32
_KINDS: dict[Any, tuple[type, ...]] = {int: (int,), float: (float, int), str: (str,), bool: (bool,)}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A recipe: model, data and optimisation.

    Attributes:
        task: name of the task, for people.
        model: shape of the model.
        stages: the stages of the curriculum, in order, each a `Stage`, a `FolderStage` or a `SequenceStage`; one stage
            is enough.
        schedule_steps: optimizer steps of the last stage over which the learning rate falls. Training may stop earlier
            and resume; after these steps the learning rate stays at its floor.
        promote_at: running accuracy (over about 1,000 images) at which the next stage begins.
        review: one batch in this many is drawn from the previous stage; 0 for none.
        data: ``"fixed"``: the 160,000 training images of each stage, reshuffled each epoch; ``"fresh"``: an endless
            stream of images, each used once. Neither contains validation or test images.
        augment: mirror and transpose each image at random.
        batch: images in one forward pass of one process.
        accumulate: forward passes for one optimizer step.
        lr: peak learning rate.
        final_lr: the floor, as a share of the peak.
        warmup: steps of linear warm-up.
        weight_decay: of matrices; norms, biases, key gates and the grey-value embedding have none.
        clip: largest norm of the gradient.
        ema: decay of the moving average of the weights; a checkpoint's model then holds the average. 0 for none.
        dense_weight: weight of the dense loss (every lit pixel predicts how many markers lie on its curve, from the
            generator's ground truth); 0 trains from labels alone.
        init: folder with the initial weights, of a model of the same shape or of fewer layers, which are then
            copied side by side: 6 become 10 as 0 1 1 2 2 3 3 4 4 5; empty for random weights. A checkpoint carries its
            weights, so resuming does not need the folder.
        first_stage: index of the first stage to train, from 0.
        eval_every: steps between evaluations on the validation part of the stage; 0 for none. Evaluations do not
            change the training; the best model is kept, see `train`.
        eval_examples: number of validation examples, taken from the start of the set; all, if there are fewer.
        patience: stop after this many evaluations in a row without improvement in the same stage; 0 for never.
        seed: seed of the weights, the order of images and fresh images.
        precision: ``"fp32"``, or ``"bf16"`` for autocast.
        activation_checkpointing: recompute activations in the backward pass: less memory, more time.
        imports: names of the modules that register your own patterns. They are recorded as data; import them yourself
            before you resume from a checkpoint.

    Raises:
        ValueError: a field out of range.
    """

    task: str
    model: ModelConfig
    stages: tuple[AnyStage, ...]
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
    eval_every: int = 0
    eval_examples: int = 1000
    patience: int = 0
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
        for name, (least, most) in _COUNTS.items():
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name} must be at least {least}; got {value!r}")
            if value > most:
                raise ValueError(f"{name} must be at most {most:,}; got {value!r}")
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
        if self.patience and not self.eval_every:
            raise ValueError(f"patience counts evaluations: give eval_every too; got patience={self.patience!r} alone")
        if not self.stages:
            raise ValueError("stages must have at least one stage; got none")
        self._check_size()
        if not 0 <= self.first_stage < len(self.stages):
            raise ValueError(
                f"first_stage must be one of the {len(self.stages)} stages, from 0; got {self.first_stage!r}"
            )
        for stage in self.stages:
            stage.check(self.model)
        self._check_data()

    def _check_size(self) -> None:
        """Raise ValueError if the recipe is too large for any machine."""
        if len(self.stages) > _MOST_STAGES:
            raise ValueError(f"stages must be at most {_MOST_STAGES:,}; got {len(self.stages):,}")
        longest = max(stage.tokens_each for stage in self.stages)
        if (tokens := self.batch * longest) > _MOST_TOKENS:
            raise ValueError(
                f"a batch must be at most {_MOST_TOKENS:,} tokens; got {tokens:,}: batch={self.batch!r} of {longest:,} "
                f"tokens each"
            )
        model = self.model
        stored = 1 if model.tied else model.layers
        if (weights := stored * model.width * (4 * model.width + 2 * model.mlp_width)) > _MOST_WEIGHTS:
            raise ValueError(
                f"a model to train must have at most {_MOST_WEIGHTS:,} weights in its layers; got {weights:,}: "
                f"width={model.width!r}, mlp_width={model.mlp_width!r}, layers={model.layers!r}"
            )

    def _check_data(self) -> None:
        if bool(self.dense_weight) != bool(self.model.dense_classes):
            raise ValueError(
                f"a dense loss needs a dense head and the reverse; got dense_weight={self.dense_weight!r} and "
                f"dense_classes={self.model.dense_classes!r}"
            )
        for stage in self.stages:
            stage.check_recipe(augment=self.augment, dense=self.dense_weight > 0)
            if self.data == "fresh" and not stage.drawn:
                raise ValueError('data "fresh" has no end, and files do; use "fixed"')

    @property
    def pixel_model(self) -> PixelTransformerConfig:
        """The model of a task over pixels.

        Raises:
            ValueError: the task is over symbols.
        """
        return pixel_config(self.model, f"the task {self.task} is over symbols, not over pixels")

    @property
    def pixel_stages(self) -> tuple[Stage, ...]:
        """The stages of a task over pixels whose images are drawn; raises as `pixel_model` does."""
        assert self.pixel_model
        return tuple(cast(Stage, stage) for stage in self.stages if stage.drawn)

    @property
    def chance(self) -> float:
        """The accuracy of guessing."""
        return 1 / self.model.classes

    @property
    def changeable(self) -> tuple[str, ...]:
        """Fields that may change when a run resumes, because its numbers do not depend on them."""
        # The best score depends on the number of examples; before the first evaluation it may still change.
        return ("eval_every", "patience") if self.eval_every else ("eval_every", "patience", "eval_examples")

    def drawn_from(self, global_batch: int, stage: int) -> int:
        """The stage that the images of a global batch come from: this one, or the one before in a review."""
        review = self.review and global_batch % self.review == self.review - 1
        return stage - 1 if review and stage else stage

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
            return cls(**check_field_types(cls, fields))
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a training config of this version: {shown(error)}") from None

    def differences(self, other: "TrainConfig") -> list[str]:
        """Names of the fields in which a run's config, ``other``, differs from this one, with which it is to resume.

        The folder of equal files and the frequency of evaluations do not count.
        """
        mine, theirs = (json.loads(json.dumps(config.to_dict())) for config in (self, other))
        for one, two in zip(mine["stages"], theirs["stages"], strict=False):
            # Configs of older versions have the folder only.
            for name in ("folder",) if one.get("digest") and two.get("digest") else ("examples", "digest"):
                one.pop(name, None)
                two.pop(name, None)
        return [name for name in mine if mine[name] != theirs[name] and name not in other.changeable]

    def moved(self, folder: str | Path) -> Self:
        """The same recipe for files that are now in another folder; `train` checks that they are equal.

        Raises:
            ValueError: the examples are drawn, or the recipe does not record the files that it started with.
        """
        where, stages = str(Path(folder).resolve()), list[AnyStage]()
        for stage in self.stages:
            if stage.drawn:
                raise ValueError(f"the examples of this run are drawn, it has no folder; got {str(folder)!r}")
            if not stage.digest and stage.folder != where:
                raise ValueError(
                    f"this run did not note which files it was begun with, so those in {where} cannot be compared with "
                    f"them; it goes on with the files in {stage.folder} alone"
                )
            stages.append(stage.moved(where))
        return dataclasses.replace(self, stages=tuple(stages))


def _stage_from(fields: dict[str, Any]) -> AnyStage:
    if "split" in fields:
        return FolderStage(**check_field_types(FolderStage, fields))
    if "geometry" not in fields:
        return sequence_stage_from(fields)
    return Stage(
        **check_field_types(Stage, {**fields, "geometry": Geometry(**check_field_types(Geometry, fields["geometry"]))})
    )
