"""How kernels walk over the blocks of a line. What a step needs is read one step ahead.

At the head of the loop only rows and bits with known addresses are read: loading an index there would drain the
prefetch of K and V.
"""

# @triton.jit bodies are a language of their own.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton.common import entries, load_rows, load_seen, load_words_t
from sparseflash.kernels.triton.tiles import load_bits
from sparseflash.kernels.triton.types import Blocks, KeyBits, QueryBits


@triton.jit
def _item(lists, place):
    return lists.work_items + (place.pattern * place.items + place.rank // place.steps) * 6


@triton.jit
def line_of(lists, place):
    """The line of a program; -1: nothing to do."""
    if lists.work_items is None:
        return tl.load(lists.order + place.pattern * place.lines + place.rank // place.steps)
    else:
        return tl.load(_item(lists, place))


@triton.jit
def slot_of(lists, place):
    """The slot for a work item's partial result; -1: it is the whole line."""
    return tl.load(_item(lists, place) + 5)


@triton.jit
def ranges_of(lists, place, line):
    """Pointer to where a program's line, or its split of the line, starts and stops: four numbers."""
    if lists.work_items is None:
        return lists.ranges + (place.pattern * place.lines + line) * 4
    else:
        return _item(lists, place) + 1


@triton.jit
def blocks_of(lists, span, low, high, PARTIAL: tl.constexpr):
    """The FULL or the PARTIAL blocks of a line; from `low` to `high`: see `entries`."""
    start, count = entries(span, low, high, PARTIAL)
    if PARTIAL:
        return Blocks(lists.partial_indices + start, lists.partial_tiles + start, count)
    else:
        return Blocks(lists.full_indices + start, lists.partial_tiles, count)


@triton.jit
def load_step(rows, first, keep, UNIT: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[STEP, DP] rows from `first` on. A descriptor ignores `keep`; rows that are not there come as zeros."""
    if rows.descriptor is not None:
        return rows.descriptor.load([rows.batch, rows.head, first, 0]).reshape(STEP, DP)
    else:
        return load_rows(rows.ptr, first, rows.stride, keep, UNIT, STEP, D, DP)


@triton.jit
def block_of(blocks, i, STEPS: tl.constexpr):
    """The block of step i, where a block takes STEPS steps; 0 past the last one."""
    at = i // STEPS
    return tl.load(blocks.index + at, mask=at < blocks.count, other=0)


@triton.jit
def first_key_bits(blocks, bits, query, sizes):
    """The bits of the first step over the keys of a row's PARTIAL blocks.

    `query` is the first one of the program within its block.
    """
    STEPS: tl.constexpr = sizes.BK // sizes.BN
    tile = tl.load(blocks.tile, mask=blocks.count > 0, other=0)
    there = blocks.count > 0
    seen = load_seen(bits.seen, tile, 0, there, (sizes.BK + 31) // 32, sizes.BN)
    words = load_bits(bits.words, tile, query, 0, there, sizes.FRAGMENTS, sizes.BQ, sizes.BK, sizes.BM, sizes.BN)
    tile = tl.load(blocks.tile + 1 // STEPS, mask=blocks.count > 1 // STEPS, other=0)
    return KeyBits(tile, seen, words)


@triton.jit
def next_key_bits(ahead, i, blocks, bits, query, sizes):
    """The bits of the step that follows step i."""
    STEPS: tl.constexpr = sizes.BK // sizes.BN
    key = ((i + 1) % STEPS) * sizes.BN
    there = (i + 1) // STEPS < blocks.count
    seen = load_seen(bits.seen, ahead.tile, key, there, (sizes.BK + 31) // 32, sizes.BN)
    words = load_bits(
        bits.words, ahead.tile, query, key, there, sizes.FRAGMENTS, sizes.BQ, sizes.BK, sizes.BM, sizes.BN
    )
    after = (i + 2) // STEPS
    tile = tl.load(blocks.tile + after, mask=after < blocks.count, other=0)
    return KeyBits(tile, seen, words)


@triton.jit
def first_query_bits(blocks, bits, key, sizes):
    """The bits of the first step over the queries of a column's PARTIAL blocks; `key` as `query` above."""
    STEPS: tl.constexpr = sizes.BQ // sizes.BM
    tile = tl.load(blocks.tile, mask=blocks.count > 0, other=0)
    there = blocks.count > 0
    words = load_words_t(bits.words, tile, 0, key, there, sizes.BQ, (sizes.BK + 31) // 32, sizes.BM, sizes.BN)
    tile = tl.load(blocks.tile + 1 // STEPS, mask=blocks.count > 1 // STEPS, other=0)
    return QueryBits(tile, words)


@triton.jit
def next_query_bits(ahead, i, blocks, bits, key, sizes):
    """The bits of the step that follows step i."""
    STEPS: tl.constexpr = sizes.BQ // sizes.BM
    query = ((i + 1) % STEPS) * sizes.BM
    there = (i + 1) // STEPS < blocks.count
    words = load_words_t(bits.words, ahead.tile, query, key, there, sizes.BQ, (sizes.BK + 31) // 32, sizes.BM, sizes.BN)
    after = (i + 2) // STEPS
    tile = tl.load(blocks.tile + after, mask=after < blocks.count, other=0)
    return QueryBits(tile, words)
