"""Lookup tables straight from dense token masks: slow, obvious, and sharing no code with the real builder."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from sparseflash.kernels.layout import BlockLists, Tiles

Mask = npt.NDArray[np.bool_]
Items = list[tuple[int, ...]]


class Tables(NamedTuple):
    """What the launchers take besides q, k and v."""

    rows: BlockLists
    columns: BlockLists
    tiles: Tiles
    pattern_of: torch.Tensor
    block: tuple[int, int]


def _side(codes: npt.NDArray[np.int64], longest: int | None) -> BlockLists:
    """The side whose lines are the second axis of codes [P, lines, others]: 0 empty, 1 full, 2 + t tile t.

    Lines of more than `longest` blocks are split into parts of that many, the last one shorter.
    """
    full: list[int] = []
    partial: list[int] = []
    tile: list[int] = []
    ranges = []
    order = []
    for pattern in codes:
        lines = []
        for line in pattern:
            full_start, partial_start = len(full), len(partial)
            full += [other for other, code in enumerate(line) if code == 1]
            partial += [other for other, code in enumerate(line) if code > 1]
            tile += [code - 2 for code in line if code > 1]
            lines.append((full_start, len(full), partial_start, len(partial)))
        ranges.append(lines)
        order.append(sorted(range(len(lines)), key=lambda n, p=pattern: (-int((p[n] > 0).sum()), n)))  # type: ignore[misc]
    P, n = codes.shape[:2]
    int32 = torch.int32
    work, reductions = _splits(ranges, longest)
    return BlockLists(
        torch.tensor(ranges, dtype=int32).reshape(P, n, 4),
        torch.tensor(full, dtype=int32),
        torch.tensor(partial, dtype=int32),
        torch.tensor(tile, dtype=int32),
        torch.tensor(order, dtype=int32).reshape(P, n),
        torch.tensor(work, dtype=int32).reshape(P, -1, 6),
        torch.tensor(reductions, dtype=int32).reshape(P, -1, 3),
    )


def _splits(ranges: list[list[tuple[int, int, int, int]]], longest: int | None) -> tuple[list[Items], list[Items]]:
    """Work items and reductions of each pattern; empty when no line is split."""
    work: list[Items] = []
    reductions: list[Items] = []
    for lines in ranges:
        items: Items = []
        cut: Items = []
        slots = 0
        for number, (a, b, c, d) in enumerate(lines):
            places = [(0, i) for i in range(a, b)] + [(1, i) for i in range(c, d)]
            if longest is None or len(places) <= longest:
                items.append((number, a, b, c, d, -1))
                continue
            before = slots
            for start in range(0, len(places), longest):
                split = places[start : start + longest]
                full, partial = ([i for kind, i in split if kind == wanted] for wanted in (0, 1))
                at_full = (full[0], full[-1] + 1) if full else (b, b)
                at_partial = (partial[0], partial[-1] + 1) if partial else (c, c)
                items.append((number, *at_full, *at_partial, slots))
                slots += 1
            cut.append((number, before, slots))
        work.append(sorted(items, key=lambda i: i[1] - i[2] + i[3] - i[4]))
        reductions.append(cut)
    if not any(reductions):
        return [[] for _ in ranges], [[] for _ in ranges]
    most, cuts = max(map(len, work)), max(map(len, reductions))
    return (
        [items + [(-1,) * 6] * (most - len(items)) for items in work],
        [cut + [(-1,) * 3] * (cuts - len(cut)) for cut in reductions],
    )


def _words(bits: npt.NDArray[np.bool_]) -> list[int]:
    """Signed 32-bit words of a row of bits, bit j of word w for entry 32 w + j."""
    words = []
    for start in range(0, len(bits), 32):
        word = sum(1 << j for j, bit in enumerate(bits[start : start + 32]) if bit)
        words.append(word - (1 << 32) if word >= 1 << 31 else word)
    return words


def build(
    mask: Mask,  # [P, N, M]
    block: tuple[int, int],
    pattern_of: list[list[int]],  # [B or 1][Hq or 1]
    all_partial: bool = False,  # list FULL blocks as PARTIAL ones
    longest: int | None = None,  # blocks past which lines are split
) -> Tables:
    """Tables of P dense masks."""
    BQ, BK = block
    P, N, M = mask.shape
    nQ, nK = -(-N // BQ), -(-M // BK)
    whole = np.zeros((P, nQ * BQ, nK * BK), bool)
    whole[:, :N, :M] = mask
    codes = np.zeros((P, nQ, nK), np.int64)
    seen: dict[bytes, int] = {}
    tiles: list[Mask] = []
    for p, row, column in np.ndindex(P, nQ, nK):
        tile = whole[p, row * BQ : (row + 1) * BQ, column * BK : (column + 1) * BK]
        if tile.all() and not all_partial:
            codes[p, row, column] = 1
        elif tile.any():
            if tile.tobytes() not in seen:
                seen[tile.tobytes()] = len(tiles)
                tiles.append(tile)
            codes[p, row, column] = 2 + seen[tile.tobytes()]
    W = -(-BK // 32)
    bits = [[_words(row) for row in tile] for tile in tiles]
    seen_keys = [_words(tile.any(axis=0).reshape(-1)) for tile in tiles]
    return Tables(
        _side(codes, longest),
        _side(codes.transpose(0, 2, 1), longest),
        Tiles(
            torch.tensor(bits, dtype=torch.int32).reshape(len(tiles), BQ, W),
            torch.tensor(seen_keys, dtype=torch.int32).reshape(len(tiles), W),
        ),
        torch.tensor(pattern_of, dtype=torch.int32),
        block,
    )
