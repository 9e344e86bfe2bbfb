"""Laws 1 to 4: compiling is exact, a homomorphism, canonical; tables transpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.kernels.layout import BlockLists
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.patterns.runs import EMPTY, FIRST_TILE, FULL
from sparseflash.patterns.tiles import unpack
from tests.splits import lookup_with_splits
from tests.strategies import Shape, cross_documents, expressions, named_leaves, per_head, per_sample, shapes


@given(expressions() | per_head(3) | per_sample(), shapes())
def test_law_1_compiling_gives_the_truth(pattern: Pattern, shape: Shape) -> None:
    np.testing.assert_array_equal(shape.compile(pattern).to_dense(), shape.truth(pattern))


@given(expressions() | per_head(2), shapes(5000))
def test_law_1_at_longer_lengths(pattern: Pattern, shape: Shape) -> None:
    # The truth of all pairs of 5,000 x 5,000 tokens takes seconds: one side is cut.
    shape = replace(shape, q_len=min(shape.q_len, 2_000_000 // shape.kv_len + 1))
    np.testing.assert_array_equal(shape.compile(pattern).to_dense(), shape.truth(pattern))


@given(cross_documents())
def test_law_1_where_the_keys_are_another_sequence(packed: tuple[Pattern, Shape]) -> None:
    pattern, shape = packed
    np.testing.assert_array_equal(shape.compile(pattern).to_dense(), shape.truth(pattern))
    assert sf.parse(str(pattern)) == pattern


@given(expressions() | per_head(3), expressions() | per_head(3) | per_sample(), shapes(300))
def test_law_2_compiling_is_a_homomorphism(p: Pattern, r: Pattern, shape: Shape) -> None:
    operators: list[tuple[Callable[..., Pattern], Callable[..., BlockMask]]] = [
        (lambda a, b: a | b, lambda a, b: a | b),
        (lambda a, b: a & b, lambda a, b: a & b),
        (lambda a, b: a - b, lambda a, b: a - b),
        (lambda a, _: ~a, lambda a, _: ~a),
    ]
    for on_patterns, on_masks in operators:
        assert shape.compile(on_patterns(p, r)) == on_masks(shape.compile(p), shape.compile(r))


@given(expressions(), shapes(300))
def test_law_2_operators_agree_with_numpy(p: Pattern, shape: Shape) -> None:
    mask, other = shape.compile(p), shape.compile(P.strided(3, unit=5))
    a, b = mask.to_dense(), other.to_dense()
    for result, expected in ((mask | other, a | b), (mask & other, a & b), (mask - other, a & ~b), (~mask, ~a)):
        np.testing.assert_array_equal(result.to_dense(), expected)


@given(expressions() | per_head(2), shapes())
def test_law_3_canonical_form(pattern: Pattern, shape: Shape) -> None:
    mask = shape.compile(pattern)
    bits = unpack(mask.tiles, mask.block[1])
    assert bits.any(axis=(1, 2)).all(), "an all-zero tile is stored"
    assert not bits.all(axis=(1, 2)).any(), "an all-one tile is stored"
    assert len({tile.tobytes() for tile in mask.tiles}) == len(mask.tiles), "a tile is stored twice"
    runs, cols = mask.runs, mask.grid_shape[1]
    assert (runs.code != EMPTY).all()
    assert (runs.start < runs.stop).all()
    assert (runs.start[1:] >= runs.stop[:-1]).all(), "runs overlap or are not sorted"
    assert (runs.start // cols == (runs.stop - 1) // cols).all(), "a run crosses a row"
    touching = (runs.start[1:] == runs.stop[:-1]) & (runs.start[1:] % cols != 0)
    assert (runs.code[1:] != runs.code[:-1])[touching].all(), "touching runs are not joined"
    met = list(dict.fromkeys(runs.code[runs.code > FULL].tolist()))
    assert met == list(range(FIRST_TILE, FIRST_TILE + len(mask.tiles))), "tiles are not numbered as met"


@given(expressions() | per_head(2), shapes(300))
def test_law_3_equal_masks_have_equal_bytes(pattern: Pattern, shape: Shape) -> None:
    direct = shape.compile(pattern)
    detour = ~(~direct & ~(direct & direct)) - (direct - direct)
    assert direct == detour
    assert hash(direct) == hash(detour)
    for name in ("start", "stop", "code"):
        assert getattr(direct.runs, name).tobytes() == getattr(detour.runs, name).tobytes()
    assert direct.tiles.tobytes() == detour.tiles.tobytes()
    changed = direct | shape.compile(P.global_tokens((shape.kv_len - 1,)))
    assert (changed == direct) == bool(np.array_equal(changed.to_dense(), direct.to_dense()))


def entries(side: BlockLists, p: int) -> set[tuple[int, int, int]]:
    """(line, other, code) of one pattern, read the way a kernel reads it."""
    found: list[tuple[int, int, int]] = []
    for line, (a, b, c, d) in enumerate(side.ranges[p].tolist()):
        found += [(line, int(side.full_indices[i]), FULL) for i in range(a, b)]
        found += [(line, int(side.partial_indices[i]), FIRST_TILE + int(side.partial_tiles[i])) for i in range(c, d)]
    assert len(found) == len(set(found)), "a block is listed twice"
    return set(found)


@given(expressions() | per_head(2), shapes())
def test_law_4_column_tables_hold_the_row_tables_entries(pattern: Pattern, shape: Shape) -> None:
    mask = shape.compile(pattern)
    assert mask.transposed().transposed() == mask
    np.testing.assert_array_equal(mask.transposed().to_dense(), np.swapaxes(mask.to_dense(), -1, -2))
    table = sf.lookup(mask)
    rows, cols, codes = mask.runs.blocks()
    for p in range(mask.patterns):
        here = rows // mask.grid_shape[0] == p
        stored = zip((rows[here] % mask.grid_shape[0]).tolist(), cols[here].tolist(), codes[here].tolist(), strict=True)
        by_row = entries(table.rows, p)
        assert by_row == set(stored)
        assert by_row == {(row, col, code) for col, row, code in entries(table.columns, p)}
    for side in (table.rows, table.columns):
        weight = side.ranges[..., 1] - side.ranges[..., 0] + side.ranges[..., 3] - side.ranges[..., 2]
        in_order = weight.gather(1, side.order.long())
        assert (in_order[:, 1:] <= in_order[:, :-1]).all(), "heavy lines are not first"
        lines = torch.arange(side.order.shape[1], dtype=torch.int32)
        assert torch.equal(side.order.sort(1).values, lines.expand_as(side.order))


@given(expressions() | per_head(2), shapes())
def test_law_4_splits_hold_the_entries_of_their_lines(pattern: Pattern, shape: Shape) -> None:
    table = lookup_with_splits(shape.compile(pattern))
    for side in (table.rows, table.columns):
        if side.work_items.shape[1] == 0:
            assert side.slots == 0
            assert side.reductions.shape[1] == 0
            continue
        everything = (x.tolist() for x in (side.ranges, side.work_items, side.reductions))
        for p, (lines, items, reductions) in enumerate(zip(*everything, strict=True)):
            owner = {slot: line for line, first, stop in reductions if line >= 0 for slot in range(first, stop)}
            assert max(owner, default=-1) < side.slots
            found: list[tuple[int, int, int]] = []
            reached: dict[int, int] = {}
            for line, a, b, c, d, slot in sorted(items, key=lambda item: item[5]):
                if line < 0:
                    continue
                assert owner.pop(slot, -1) == (line if slot >= 0 else -1), "a partial result that nothing reduces"
                found += [(line, int(side.full_indices[i]), FULL) for i in range(a, b)]
                found += [
                    (line, int(side.partial_indices[i]), FIRST_TILE + int(side.partial_tiles[i])) for i in range(c, d)
                ]
                # The backward pass reads where a split starts and stops off its ranges: they may have no gaps.
                start, _, middle, _ = lines[line]
                assert reached.get(line, 0) == a - start + c - middle
                reached[line] = b - start + d - middle
            assert not owner, "a slot that nobody writes"
            assert len(found) == len(set(found)), "a block is walked twice"
            assert set(found) == entries(side, p)


@given(expressions(named_leaves) | per_head(2, named_leaves) | per_sample(named_leaves))
def test_text_parses_back_to_the_pattern(pattern: Pattern) -> None:
    assert sf.parse(str(pattern)) == pattern
    assert hash(sf.parse(str(pattern))) == hash(pattern)


@given(expressions() | per_head(2), shapes(300))
def test_figures_count_what_is_stored(pattern: Pattern, shape: Shape) -> None:
    mask = shape.compile(pattern)
    dense = mask.to_dense()
    assert mask.tokens == dense.sum()
    assert mask.token_density == dense.mean()
    (nq, nk), (bq, bk) = mask.grid_shape, mask.block
    padded = np.zeros((*dense.shape[:-2], nq * bq, nk * bk), bool)
    padded[..., : shape.q_len, : shape.kv_len] = dense
    blocks = padded.reshape(-1, nq, bq, nk, bk)
    assert mask.nnz == blocks.any(axis=(2, 4)).sum()
    assert mask.full_blocks == blocks.all(axis=(2, 4)).sum()


@pytest.mark.parametrize("pattern", [P.full(), P.causal(), ~P.causal(), P.causal() | P.local(7)], ids=str)
def test_long_rows_share_their_entries(pattern: Pattern) -> None:
    """A dense or causal table grows with N, not with N squared."""
    sizes = [sf.lookup(pattern.compile(n)).nbytes for n in (1 << 16, 1 << 18)]
    assert sizes[1] < 5 * sizes[0]
