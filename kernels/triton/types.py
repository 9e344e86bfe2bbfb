"""Groups of values that launches pass to the Triton kernels, and these to their helpers.

A NamedTuple costs no instruction and no host time. A field that is None compiles to nothing.
Three limits of Triton: a NamedTuple of constants (`Sizes`) has to be made in the call that takes it; a helper cannot
return one with a field that is None (3.6); and lengths and strides stay separate arguments of a launch, because inside
a tuple they would be specialised by value.

Shape legend in `common`.
"""

from __future__ import annotations

from typing import Any, NamedTuple


class Sizes(NamedTuple):
    """Compile-time constants, see `common`."""

    FRAGMENTS: Any  # whether tile bits lie in fragment order, see `tiles`
    UNIT: Any
    D: Any
    DP: Any
    DV: Any
    DVP: Any
    BQ: Any  # None in decoding
    BK: Any
    BM: Any
    BN: Any


class Rows(NamedTuple):
    """The rows of one head of a matrix: read by a descriptor where there is one, else through pointers."""

    ptr: Any  # to row 0
    stride: Any
    descriptor: Any  # of the whole tensor [B, H, N, D], for tiles [1, 1, step, D]; or None
    batch: Any
    head: Any


class ListPointers(NamedTuple):
    """Pointers to the block lists of all lines, and to which program takes which line: see `layout.BlockLists`."""

    ranges: Any
    full_indices: Any
    partial_indices: Any
    partial_tiles: Any
    order: Any  # None in decoding
    work_items: Any  # None where no line is split


class Place(NamedTuple):
    """Where a program finds its line."""

    pattern: Any  # int64
    rank: Any  # of the program; in `ListPointers.order` or `.work_items` its line has this one divided by `steps`
    steps: Any  # programs of a line
    lines: Any  # of a pattern
    items: Any  # work items of a pattern


class Blocks(NamedTuple):
    """The FULL or the PARTIAL blocks of a line that a program visits."""

    index: Any  # pointer to the first one's index on the other side
    tile: Any  # pointer to the first one's tile; only PARTIAL blocks have tiles
    count: Any


class Bits(NamedTuple):
    """The bits of all tiles: see `layout.Tiles`."""

    words: Any  # pointer
    seen: Any  # pointer to which keys any query of a tile sees; None where a pass does not ask


class RowBits(NamedTuple):
    """The bits of arbitrary rows of each tile."""

    words: Any  # pointer to those of all tiles
    rows: Any  # [BM]: rows within a tile
    height: Any  # BQ, which is no constant here


class KeyBits(NamedTuple):
    """Tile bits of a step over the keys of PARTIAL blocks, read one iteration ahead."""

    tile: Any  # of the step after this one
    seen: Any  # [BN]: keys that any query of the tile sees
    words: Any


class QueryBits(NamedTuple):
    """Likewise of a step over queries."""

    tile: Any
    words: Any


class Bias(NamedTuple):
    """The additive bias of one head, see `bias`. `row` and `column` are None where there is one for all."""

    ptr: Any  # to the number of query 0 and key 0, or of distance -R
    row: Any  # elements from one query to the next; None in a relative bias, as `column`
    column: Any
    reach: Any  # R of a relative bias, else None
    offset: Any  # position of query 0, where there is a reach
    queries: Any  # N
    keys: Any  # M
    unit: Any  # of scores


class Score(NamedTuple):
    """From products to scores, see `score`; None where a feature is off."""

    c: Any  # the scale, in the unit of the exponential
    cap: Any
    slope: Any  # in decoding of each row [BM]
    position: Any  # of the first row of this step, queries counted from the first key; in decoding of each row [BM]
    dropout: Any  # keys of the rows [BM]; in the pass over columns the key of the head
    threshold: Any
    bias: Any  # `Bias`


class Softmax(NamedTuple):
    """A running softmax over the keys seen so far, in base 2."""

    acc: Any  # fp32 [BM, DVP]: sum of exp2(c s - peak) v
    peak: Any  # fp32 [BM]: largest c s
    total: Any  # fp32 [BM]: sum of exp2(c s - peak)


class Queries(NamedTuple):
    """The queries that a program holds in the backward pass."""

    q: Any  # [BM, DP]
    dout: Any  # [BM, DVP]
    norm: Any  # fp32 [BM], see `backward`
    delta: Any  # fp32 [BM]
    first: Any  # index of the first one


class Saved(NamedTuple):
    """What the forward pass saved of a head's queries, for a program that walks over them."""

    norm: Any  # pointer to query 0's, see `backward`
    delta: Any  # likewise
    count: Any  # N


class Keys(NamedTuple):
    """Keys and values that a program holds, and their gradients so far."""

    k: Any  # [BN, DP]
    v: Any  # [BN, DVP]
    dk: Any  # fp32 [BN, DP]
    dv: Any  # fp32 [BN, DVP]
    first: Any  # index of the first one


class Held(NamedTuple):
    """Keys and values that a program holds."""

    k: Any  # [BN, DP]
    v: Any  # [BN, DVP]
    first: Any  # index of the first key


class Sums(NamedTuple):
    """A program's part of a bias's gradient."""

    ptr: Any  # fp32, to the head's elements; of a relative bias to the program's own
    width: Any  # M
    keys: Any  # fp32 [BN]: of each key, where the bias is one of keys
    below: Any  # fp32: of distances below -R
    above: Any  # likewise above R


class Splits(NamedTuple):
    """The splits of one line that a program reduces, for a step of the line's tokens."""

    index: Any  # of the head among those of all samples
    line: Any  # -1: nothing to do
    begin: Any  # the first split's slot
    end: Any  # the slot past the last one's
    step: Any
