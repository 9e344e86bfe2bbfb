"""A video model made sparse: denoise with each of some patterns, and print how far the videos are from dense ones.

The model is a small Wan that is trained first, by flow matching, on discs that move over a grey ground. Needs
diffusers; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

import sparseflash as sf
from sparseflash.integrations.diffusers import use_pattern

FRAMES, SIDE, PATCH = 5, 16, 2
TOKENS_A_FRAME = (SIDE // PATCH) ** 2
TOKENS = FRAMES * TOKENS_A_FRAME
# The same place in every frame, and a window around it in the order of tokens: frame by frame, row by row.
PATTERNS = ("full()", *(f"strided({TOKENS_A_FRAME}) | local({window})" for window in (128, 64, 32, 16, 4)))


class Result(NamedTuple):
    """How a pattern did."""

    pattern: str
    density: float  # allowed pairs over all pairs
    psnr: float  # dB between its videos and the dense ones
    psnr_dense_first: float  # likewise with the first steps dense


def videos(count: int, generator: torch.Generator) -> Tensor:
    """Discs that move over a grey ground, fp32 [count, 1, frames, height, width] within -1 to 1."""
    start, speed = (torch.rand(count, 1, 2, generator=generator) for _ in range(2))
    centre = start * SIDE + (speed - 0.5) * 6 * torch.arange(FRAMES)[None, :, None]
    place = torch.stack(torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij"), -1) + 0.5
    away = (place - centre[:, :, None, None] + SIDE / 2) % SIDE - SIDE / 2
    return (2 * torch.sigmoid(2 * (4 - away.norm(dim=-1))) - 1)[:, None]


def small_model() -> Any:
    """A random Wan of two layers; its prompt is one token that says nothing."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH), num_attention_heads=2, attention_head_dim=24, in_channels=1, out_channels=1,
        text_dim=8, freq_dim=32, ffn_dim=96, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def velocity(model: Any, noisy: Tensor, time: Tensor) -> Tensor:
    """What the model says of videos at a time from 0, clean, to 1, noise."""
    prompt = torch.zeros(len(noisy), 1, model.config.text_dim)
    out: Tensor = model(noisy, 1000 * time, prompt).sample
    return out


def train(model: Any, steps: int, batch: int) -> float:
    """Flow matching: between noise and a video, the velocity is their difference. The mean loss of the last steps."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(steps):
        clean = videos(batch, generator)
        noise, time = torch.randn(clean.shape, generator=generator), torch.rand(batch, generator=generator)
        share = time.view(-1, 1, 1, 1, 1)
        loss = F.mse_loss(velocity(model, (1 - share) * clean + share * noise, time), noise - clean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-20:]) / max(len(losses[-20:]), 1)


@torch.no_grad()
def denoise(model: Any, noise: Tensor, steps: int) -> Tensor:
    """Videos from noise, by so many Euler steps."""
    x = noise
    for now, then in pairwise(torch.linspace(1, 0, steps + 1)):
        x = x + (then - now) * velocity(model, x, now.expand(len(x)))
    return x


def psnr(found: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; values range over 2."""
    error = F.mse_loss(found, wanted).item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def compare(model: Any, patterns: Sequence[str], *, videos: int, steps: int, dense_steps: int) -> list[Result]:
    """Each pattern's videos beside the model's own, from the same noise."""
    noise = torch.randn(videos, 1, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    dense = denoise(use_pattern(model, None), noise, steps)
    found = []
    for pattern in patterns:
        sparse, later = (
            psnr(denoise(use_pattern(model, pattern, dense_steps=first, block=16), noise, steps), dense)
            for first in (0, dense_steps)
        )
        found.append(Result(pattern, sf.parse(pattern).compile(TOKENS, block=16).token_density, sparse, later))
    use_pattern(model, None)
    return found


def main(arguments: list[str] | None = None) -> list[Result]:
    """Train the model, then denoise with each pattern."""
    parser = argparse.ArgumentParser(prog="python -m examples.denoise", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--patterns", nargs="+", default=PATTERNS, help=f"of {TOKENS} tokens; default windows")
    parser.add_argument("--train-steps", type=int, default=300, help="of the model; default 300")
    parser.add_argument("--batch", type=int, default=8, help="videos in a step of training; default 8")
    parser.add_argument("--videos", type=int, default=8, help="denoised with each pattern; default 8")
    parser.add_argument("--steps", type=int, default=12, help="of denoising; default 12")
    parser.add_argument("--dense-steps", type=int, default=3, help="first steps that stay dense; default 3")
    chosen = parser.parse_args(arguments)
    torch.manual_seed(0)
    console, model = Console(), small_model()
    loss = train(model, chosen.train_steps, chosen.batch)
    console.print(f"{TOKENS} tokens; trained for {chosen.train_steps} steps, mean squared error {loss:.3f}")
    model.eval()
    wanted = {"videos": chosen.videos, "steps": chosen.steps, "dense_steps": chosen.dense_steps}
    found = compare(model, chosen.patterns, **wanted)
    table = Table("pattern", "pairs", "PSNR", f"PSNR, first {chosen.dense_steps} of {chosen.steps} steps dense")
    for result in found:
        table.add_row(
            result.pattern, f"{result.density:.1%}", f"{result.psnr:.1f} dB", f"{result.psnr_dense_first:.1f} dB"
        )
    console.print(table)
    return found


if __name__ == "__main__":
    main()
