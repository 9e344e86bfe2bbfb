"""Which settings are measured, the most important first: the targets' rows, then the whole grid by distance from them.

Heads times head dim is 2,048, as in the FlashAttention papers (less at 256K tokens, where one call would take
seconds); a batch has at least 16,384 tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.masks import DENSITIES, GPU_MASKS


@dataclass(frozen=True)
class Setting:
    """One row: a mask, and operands of self-attention.

    Attributes:
        mask: a name of GPU_MASKS.
        seq_len: tokens.
        head_dim, block: of operands and table.
        group: query heads for each key head.
        dtype: as torch names it.
        every_form: FlexAttention in all its forms, which takes minutes of compiling, and not in its default alone.
        heads, batch: None for what this module's text says.
    """

    mask: str
    seq_len: int = 16384
    head_dim: int = 128
    block: int = 128
    group: int = 1
    dtype: str = "bfloat16"
    every_form: bool = False
    heads: int | None = None
    batch: int | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Samples, query heads, key heads."""
        width = 2048 if self.seq_len <= 1 << 16 else 512
        heads = self.heads or max(width // self.head_dim, 8)
        return self.batch or max(16384 // self.seq_len, 1), heads, max(heads // self.group, 1)

    def asked(self) -> dict[str, Any]:
        """What the row is known by."""
        return {"kind": "attention", **asdict(self)}


LENGTHS = (1 << 12, 1 << 14, 1 << 16, 1 << 18)
HEAD_DIMS = (128, 64, 32)
BLOCKS = (128, 64)
GROUPS = (1, 8)
COMMON = "local(1024) | butterfly(unit=128)"


def random_name(density: float, block: int) -> str:
    """The random mask whose cells are a table's blocks."""
    return f"random({density}, unit={block})"


def first() -> Iterator[Setting]:
    """What the targets are about, and the curves: in the order in which they are missed most."""
    for mask in ("full()", "causal()"):
        yield Setting(mask)
    for density in (0.1, 0.02):
        yield Setting(random_name(density, 128))
    for mask in ("full()", "causal()"):
        yield Setting(mask, head_dim=64)
    yield Setting(random_name(0.1, 64), block=64)
    yield Setting(COMMON, 1 << 16)
    for mask in ("full()", "causal()"):
        yield Setting(mask, 1 << 16)
    for density in (0.1, 0.02):
        yield Setting(random_name(density, 128), 1 << 16)
    yield Setting("full()", block=64)
    for density in (0.5, 0.2, 0.05):  # the curve against density
        yield Setting(random_name(density, 128))
    for length in (1 << 12, 1 << 14, 1 << 18):  # the curve against length
        yield Setting(COMMON, length)
    yield Setting("causal()", group=8)
    yield Setting(COMMON, 1 << 16, group=8)
    for mask in GPU_MASKS:
        if not mask.startswith("random"):
            yield Setting(mask)
    yield Setting("full()", head_dim=32)
    for mask in ("causal()", random_name(0.1, 128), COMMON, "full()"):
        yield Setting(mask, every_form=True)


def every() -> Iterator[Setting]:
    """All settings, each once."""
    masks = [mask for mask in GPU_MASKS if not mask.startswith("random")]
    grid = [
        Setting(mask, length, dim, block, group)
        for length, dim, block, group in itertools.product(LENGTHS, HEAD_DIMS, BLOCKS, GROUPS)
        for mask in (*masks, *(random_name(density, block) for density in DENSITIES))
    ]
    yield from dict.fromkeys([*first(), *sorted(grid, key=_distance)])


def _distance(setting: Setting) -> tuple[int, int]:
    """In how many ways a setting is unusual; of equals the shorter comes first."""
    usual = Setting(setting.mask)
    odd = [getattr(setting, name) != getattr(usual, name) for name in ("seq_len", "head_dim", "block", "group")]
    return sum(odd), setting.seq_len
