"""Video prediction: a neighbourhood in space and time beside dense attention, causal in time.

Squares move over a black ground and bounce off its borders. A transformer whose tokens are the patches of 8 frames
predicts, from each frame and those before it, the pixels of the next one. A single frame does not show where a square
is going, so attention has to compare frames. Two layers attend

- ``neighborhood``: to 5 x 5 patches of a frame and of the two before it (:func:`sparseflash.patterns.neighborhood`,
  causal in time);
- ``dense``: to all patches of a frame and of those before it;
- ``one frame``: to 5 x 5 patches of a frame alone, which shows that time is needed.

Positions are rotary along the three axes (:class:`sparseflash.rotary.Rotary3d`). The models take turns, a step each, so
that whatever else the machine does slows all of them.

    python -m examples.moving_shapes                       # all three, with a closing table
    python -m examples.moving_shapes --attention neighborhood --steps 100

Measured with the first command on one thread (OMP_NUM_THREADS=1) of a 2-core AMD EPYC machine under heavy load (load
average 5 to 14), torch 2.13.0, 2026-11-30. All three took 282 s of processor time together. Overlap is lit pixels of
prediction and truth over those of either, on 64 fresh videos, where three frames and more have been seen; the last
frame itself has 26.4 %.

============ ====== ======= ========= ==============
attention    pairs  overlap last loss seconds a step
============ ====== ======= ========= ==============
neighborhood  3.2 %  62.0 %    0.0525          0.846
dense        56.2 %  31.3 %    0.0871          1.694
one frame     1.2 %  13.3 %    0.0909          0.675
============ ====== ======= ========= ==============

Dense attention is behind after as many steps. This says nothing of where both end.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn

import sparseflash as sf
from sparseflash.rotary import Rotary3d

FRAMES, SIDE, PATCH = 8, 32, 2  # frames that are seen, and pixels
SQUARE, SQUARES = 4, 3
SHAPE = (FRAMES, SIDE // PATCH, SIDE // PATCH)
CAUSAL = "is_causal=(True, False, False)"
MASKS = {
    "neighborhood": f"neighborhood({SHAPE}, kernel_size=(3, 5, 5), {CAUSAL})",
    "dense": f"neighborhood({SHAPE}, kernel_size={SHAPE}, {CAUSAL})",
    "one frame": f"neighborhood({SHAPE}, kernel_size=(1, 5, 5), {CAUSAL})",
}
BLOCK = 64  # four rows of patches


def videos(count: int, generator: torch.Generator) -> Tensor:
    """Squares that move 1 or 2 pixels a frame along each axis and bounce, fp32 [count, frames + 1, height, width]."""
    room = SIDE - SQUARE
    start = torch.randint(0, room + 1, (count, SQUARES, 2, 1), generator=generator)
    speed = torch.randint(1, 3, start.shape, generator=generator)
    speed *= 2 * torch.randint(0, 2, start.shape, generator=generator) - 1
    way = (start + speed * torch.arange(FRAMES + 1)) % (2 * room)
    corner = torch.minimum(way, 2 * room - way)[..., None]  # there and back again
    pixel = torch.arange(SIDE)
    rows, columns = ((corner <= pixel) & (pixel < corner + SQUARE)).unbind(2)  # [count, squares, frames + 1, side]
    return (rows[..., :, None] & columns[..., None, :]).any(1).float()


class Predictor(nn.Module):
    """Two transformer blocks over patches, which predict the next frame of each."""

    def __init__(self, mask: str, width: int = 48, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Linear(PATCH**2, width)
        layers = [sf.SparseAttention(width, heads, mask, block=BLOCK, rotary=Rotary3d(SHAPE)) for _ in range(2)]
        self.blocks = nn.Sequential(*(sf.SparseTransformerBlock(layer, mlp_width=3 * width) for layer in layers))
        self.head = nn.Sequential(nn.RMSNorm(width), nn.Linear(width, PATCH**2))

    def forward(self, frames: Tensor) -> Tensor:
        """Frames [B, T, height, width] -> scores of the pixels of the frames that follow each, of the same shape."""
        patches = rearrange(frames, "b t (h p) (w q) -> b (t h w) (p q)", p=PATCH, q=PATCH)
        scores = self.head(self.blocks(self.embedding(patches)))
        _, height, width = SHAPE
        whole: Tensor = rearrange(scores, "b (t h w) (p q) -> b t (h p) (w q)", h=height, w=width, p=PATCH, q=PATCH)
        return whole


def train(model: Predictor, steps: int, *, batch: int = 4, rate: float = 1.5e-2, seed: int = 0) -> Iterator[float]:
    """Train the model; the loss of each step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        video = videos(batch, generator)
        loss = F.binary_cross_entropy_with_logits(model(video[:, :-1]), video[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def overlap(found: Tensor, wanted: Tensor) -> float:
    """Lit pixels of both over those of either, where at least three frames have been seen."""
    found, wanted = found[:, 2:] > 0.5, wanted[:, 2:] > 0.5
    return float((found & wanted).sum() / (found | wanted).sum())


@torch.no_grad()
def accuracy(model: Predictor, count: int = 64, seed: int = 1_000_003) -> float:
    """The overlap of predicted and true frames, on videos of a seed that training does not use."""
    video = videos(count, torch.Generator().manual_seed(seed))
    found = torch.cat([model(part).sigmoid() for part in video[:, :-1].split(8)])
    return overlap(found, video[:, 1:])


def copying(count: int = 64, seed: int = 1_000_003) -> float:
    """The overlap of every frame with the next one."""
    video = videos(count, torch.Generator().manual_seed(seed))
    return overlap(video[:, :-1], video[:, 1:])


def main(arguments: list[str] | None = None) -> None:
    """Train, and print what was learned."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.moving_shapes", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--attention", nargs="+", choices=list(MASKS), default=list(MASKS), help="default: all three")
    parser.add_argument("--steps", type=int, default=600, help="of training, for each; default 600")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    if chosen.steps < 1:
        parser.error(f"--steps must be at least 1, got {chosen.steps}")
    console, models = Console(), {}
    for attention in chosen.attention:
        torch.manual_seed(chosen.seed)
        models[attention] = Predictor(MASKS[attention])
    running = {name: train(model, chosen.steps, seed=chosen.seed) for name, model in models.items()}
    spent, loss = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
    with Progress(console=console) as progress:
        bar = progress.add_task("training", total=chosen.steps)
        for _ in range(chosen.steps):
            for name, steps in running.items():
                started = time.perf_counter()
                loss[name] = next(steps)
                spent[name] += time.perf_counter() - started
            told = ", ".join(f"{name} {value:.4f}" for name, value in loss.items())
            progress.update(bar, advance=1, description=f"loss {told}")
    table = Table("attention", "pairs", "overlap", "last loss", "seconds a step", title=f"{chosen.steps} steps")
    for name, model in models.items():
        pairs = sf.parse(MASKS[name]).compile(FRAMES * SHAPE[1] * SHAPE[2], block=BLOCK).token_density
        table.add_row(
            name, f"{pairs:.1%}", f"{accuracy(model):.1%}", f"{loss[name]:.4f}", f"{spent[name] / chosen.steps:.3f}"
        )
    console.print(table)
    console.print(f"Copying the last frame: {copying():.1%}.")


if __name__ == "__main__":
    main()
