"""How kernels walk over the blocks of a line: which line, which blocks, and what a step needs, read one step ahead.

A step reads nothing at its loop's head but rows and bits whose addresses are known: reading an index there would drain
the prefetch of K and V.
"""

# @triton.jit bodies are a language of their own.
# mypy: allow-incomplete-defs, allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators
from __future__ import annotations

import triton
import triton.language as tl

from sparseflash.kernels.triton.common import load_rows, load_seen, load_words_t
from sparseflash.kernels.triton.tiles import load_bits
from sparseflash.kernels.triton.types import KeyStep, QueryStep


@triton.jit
def load_step(rows, first, keep, UNIT: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
    """[STEP, DP] rows from `first` on. A descriptor ignores `keep`; rows that are not there come as zeros."""
    if rows.descriptor is not None:
        return rows.descriptor.load([rows.batch, rows.head, first, 0]).reshape(STEP, DP)
    else:
        return load_rows(rows.ptr, first, rows.stride, keep, UNIT, STEP, D, DP)


@triton.jit
def first_keys(blocks, bits, query, PARTIAL: tl.constexpr, sizes):
    """The first step over the keys of a row's blocks; `query` is the first one of the program within its block."""
    SPLIT: tl.constexpr = sizes.BK // sizes.BN
    there = blocks.count > 0
    block = tl.load(blocks.index, mask=there, other=0)
    if PARTIAL:
        tile = tl.load(blocks.tile, mask=there, other=0)
        seen, words = _bits_of_keys(bits, tile, query, 0, there, sizes)
        tile = tl.load(blocks.tile + 1 // SPLIT, mask=blocks.count > 1 // SPLIT, other=0)
        return KeyStep(block, tile, words, seen)
    else:
        return KeyStep(block, block, block, block)


@triton.jit
def next_keys(step, i, blocks, bits, query, PARTIAL: tl.constexpr, sizes):
    """The step over keys that follows step i."""
    SPLIT: tl.constexpr = sizes.BK // sizes.BN
    following = (i + 1) // SPLIT
    there = following < blocks.count
    block = tl.load(blocks.index + following, mask=there, other=0)
    if PARTIAL:
        key = ((i + 1) % SPLIT) * sizes.BN
        seen, words = _bits_of_keys(bits, step.next_tile, query, key, there, sizes)
        following = (i + 2) // SPLIT
        tile = tl.load(blocks.tile + following, mask=following < blocks.count, other=0)
        return KeyStep(block, tile, words, seen)
    else:
        return KeyStep(block, block, block, block)


@triton.jit
def _bits_of_keys(bits, tile, query, key, there, sizes):
    W: tl.constexpr = (sizes.BK + 31) // 32
    seen = load_seen(bits.seen, tile, key, there, W, sizes.BN)
    words = load_bits(bits.words, tile, query, key, there, sizes.FRAGMENTS, sizes.BQ, sizes.BK, sizes.BM, sizes.BN)
    return seen, words


@triton.jit
def first_queries(blocks, bits, key, PARTIAL: tl.constexpr, sizes):
    """The first step over the queries of a column's blocks; `key` is the first one of the program within its block."""
    SPLIT: tl.constexpr = sizes.BQ // sizes.BM
    there = blocks.count > 0
    block = tl.load(blocks.index, mask=there, other=0)
    if PARTIAL:
        tile = tl.load(blocks.tile, mask=there, other=0)
        words = _bits_of_queries(bits, tile, 0, key, there, sizes)
        tile = tl.load(blocks.tile + 1 // SPLIT, mask=blocks.count > 1 // SPLIT, other=0)
        return QueryStep(block, tile, words)
    else:
        return QueryStep(block, block, block)


@triton.jit
def next_queries(step, i, blocks, bits, key, PARTIAL: tl.constexpr, sizes):
    """The step over queries that follows step i."""
    SPLIT: tl.constexpr = sizes.BQ // sizes.BM
    following = (i + 1) // SPLIT
    there = following < blocks.count
    block = tl.load(blocks.index + following, mask=there, other=0)
    if PARTIAL:
        words = _bits_of_queries(bits, step.next_tile, ((i + 1) % SPLIT) * sizes.BM, key, there, sizes)
        following = (i + 2) // SPLIT
        tile = tl.load(blocks.tile + following, mask=following < blocks.count, other=0)
        return QueryStep(block, tile, words)
    else:
        return QueryStep(block, block, block)


@triton.jit
def _bits_of_queries(bits, tile, query, key, there, sizes):
    W: tl.constexpr = (sizes.BK + 31) // 32
    return load_words_t(bits.words, tile, query, key, there, sizes.BQ, W, sizes.BM, sizes.BN)
