"""The training loop as ranks run it together in tests: in float64, so that what differs between them is no rounding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sparseflash.models import PixelTransformer, PixelTransformerConfig
from sparseflash.train import Stage, TrainConfig, recipe, train
from sparseflash.train.data import draw
from sparseflash.train.losses import loss_of

(_STAGE,) = [stage for stage in recipe("demo").stages[:1] if isinstance(stage, Stage)]
EASY = _STAGE.geometry
# Layers see far and near, blocks are small enough to travel one by one, and a window ends inside a rank's piece.
MODEL = PixelTransformerConfig(
    pattern=("butterfly(unit=16)", "local(40) | global_tokens(2)"),
    block=(16, 16), width=16, heads=2, layers=2, mlp_width=16, dense_classes=3, key_gate=True,
)  # fmt: skip
CONFIG = TrainConfig(
    task="demo", model=MODEL, stages=(Stage(EASY, baseline=0.5),), schedule_steps=10, batch=2, lr=1e-2, warmup=1,
    dense_weight=1.0,
)  # fmt: skip
LADDER = replace(
    CONFIG, stages=(*CONFIG.stages, Stage(replace(EASY, num_distractors=1), baseline=0.5)), promote_at=0.51,
    accumulate=2, ema=0.9, augment=True, activation_checkpointing=True,
)  # fmt: skip


@contextmanager
def in_float64() -> Iterator[None]:
    """Weights are made in float64, and a stage gives way within steps."""
    torch.set_default_dtype(torch.float64)
    try:
        with patch("sparseflash.train.curriculum.IMAGES", 4):
            yield
    finally:
        torch.set_default_dtype(torch.float32)


def run(config: TrainConfig, out: Path, steps: int, context: int, resume: bool = False) -> tuple[list[float], int]:
    """Losses of the steps, and the stage in which they end; every step is saved."""
    with in_float64():
        result = train(
            config, out, steps=steps, resume=resume, context_parallel=context, save_every=1, keep=100, line=print
        )
    return result.losses, result.progress.stage


def gradients(context: int, kind: str) -> None:
    """Of a batch of the loss that training minimises, those of one process, whatever holds the weights."""
    ranks = dist.get_world_size()
    mesh = init_device_mesh("cpu", (ranks // context, context), mesh_dim_names=("data", "context"))
    with in_float64():
        torch.manual_seed(0)
        alone = PixelTransformer(MODEL)
        shared = PixelTransformer(MODEL)
        shared.load_state_dict(alone.state_dict())
        if kind == "fsdp":
            fully_shard(shared, mesh=mesh)
            trained: nn.Module = shared
        else:
            trained = nn.parallel.DistributedDataParallel(shared)
        groups = [draw(CONFIG.stages[0], 0, range(i, i + 2), dense=True) for i in range(0, 2 * ranks // context, 2)]
        for each in groups:
            (loss_of(alone, each, CONFIG, CONFIG.stages[0])[0] / len(groups)).backward()
        here = groups[mesh["data"].get_local_rank()]
        loss_of(trained, here, CONFIG, CONFIG.stages[0], mesh["context"])[0].backward()
    for (name, want), got in zip(alone.named_parameters(), shared.parameters(), strict=True):
        assert want.grad is not None
        assert got.grad is not None, name
        full = got.grad.full_tensor() if kind == "fsdp" else got.grad  # type: ignore[attr-defined]
        torch.testing.assert_close(full, want.grad, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]
