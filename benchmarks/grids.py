"""Compile times of patterns of images and videos on one core, and how well blocks fit them.

python -m benchmarks.grids            # prints and writes results/<device>/<date>-grids.json
python -m benchmarks.grids --dry-run  # prints only
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from math import prod
from typing import Any

import torch

from benchmarks.record import write
from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from sparseflash.patterns.advice import WastefulPattern
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.compiling import compile_with_advice
from sparseflash.patterns.image import tiles_on_axes
from sparseflash.patterns.set_operations import full_mask

RUNS = 3
BLOCKS = (64, 128)

# Tokens after patches, and windows of about a twentieth of the video or a thirtieth of the image.
VIDEOS = {
    "Wan 480p": ((21, 30, 52), (7, 15, 27)),
    "Wan 720p": ((21, 45, 80), (7, 21, 27)),
    "HunyuanVideo 720p": ((33, 45, 80), (7, 21, 27)),
}
IMAGES = {"Flux 1K": ((64, 64), 11), "Flux 4K": ((256, 256), 47)}


def cases() -> Iterator[tuple[str, tuple[int, ...], Pattern]]:
    """Names, shapes and patterns."""
    for name, (shape, window) in VIDEOS.items():
        frames, tokens = shape[0], shape[1] * shape[2]
        yield name, shape, P.neighborhood(shape, kernel_size=window)
        for tile in ((4, 4, 4), (2, 8, 8)):
            yield name, shape, P.neighborhood(shape, None, "tile", kernel_size=window, tile=tile)
        yield name, shape, P.neighborhood(shape, kernel_size=window).coarser(128)
        yield name, shape, P.sliding_tile(shape, (4, 4, 4), 3)
        yield name, shape, P.radial(frames, tokens, decay=0.2)
        yield name, shape, P.spatial(frames, tokens)
        yield name, shape, P.temporal(frames, tokens, 64)
    for name, (image, side) in IMAGES.items():
        for order in ("raster", "tile", "hilbert"):
            yield name, image, P.neighborhood(image, None, order, kernel_size=side)
        yield name, image, P.neighborhood(image, kernel_size=side).coarser(128)


def measure(name: str, shape: tuple[int, ...], pattern: Pattern, block: int) -> dict[str, Any]:
    """Processor time of one thread, the shortest of some runs; the order of tokens is made once, in the first."""
    tokens, spent = prod(shape), []
    for _ in range(RUNS):
        for cache in (compile_with_advice, compile_pattern, full_mask, tiles_on_axes):
            cache.cache_clear()
        begun = time.process_time()
        mask = pattern.compile(tokens, block=block)
        spent.append(time.process_time() - begun)
    return {
        "grid": f"{name}: {' x '.join(map(str, shape))}, {tokens:,} tokens, blocks of {block}",
        "expression": str(pattern),
        "seq_len": tokens,
        "block": block,
        "blocks": mask.nnz,
        "tiles": len(mask.tiles),
        "density": mask.density,
        "token_density": mask.token_density,
        "stored_over_allowed": mask.density / mask.token_density,
        "compile_ms": 1e3 * min(spent),
        "first_ms": 1e3 * spent[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print without writing a result file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", WastefulPattern)
    rows = []
    for block in BLOCKS:
        for name, shape, pattern in cases():
            row = measure(name, shape, pattern, block)
            rows.append(row)
            print(
                f"{name:<18} {block:>4} {row['compile_ms']:>8.0f} ms {row['density']:>7.2%} stored, "
                f"{row['stored_over_allowed']:.2f} for each allowed pair  {row['expression']}",
                flush=True,
            )
    if not arguments.dry_run:
        print("written:", str(write("grids", rows, shortest_of=RUNS)))


if __name__ == "__main__":
    main()
