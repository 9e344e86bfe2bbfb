"""The checkers of masks and tables: they pass what is built, and notice whatever is changed."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.kernels.layout import BlockLists, Tiles
from sparseflash.patterns.runs import FULL, frozen
from tests.strategies import Shape, expressions, per_head, shapes

HEAVY = (P.local(40) | P.global_tokens(3)).compile(2000, block=16)  # some lines are split
ANY = P.per_head(P.causal() & P.local(70), P.butterfly(unit=32)).compile(500, block=32)


@given(expressions() | per_head(2), shapes(300))
def test_what_is_compiled_passes(pattern: P.Pattern, shape: Shape) -> None:
    mask = shape.compile(pattern)
    mask.check()
    sf.lookup(mask).check(mask)


@pytest.mark.parametrize("mask", [HEAVY, ANY], ids=["splits", "heads"])
def test_split_lines_and_heads_pass(mask: P.BlockMask) -> None:
    mask.check()
    sf.lookup(mask).check(mask)


@given(st.integers(1, 400), st.integers(1, 5), st.booleans(), st.integers(0, 1 << 16))
def test_routed_tables_pass(tokens: int, k: int, causal: bool, seed: int) -> None:
    blocks = -(-tokens // 32)
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(-1, blocks + 1, (1, 2, blocks, k), generator=generator)
    sf.LookupTable.from_indices(indices, shape=tokens, block=32, causal=causal).check()


@pytest.mark.parametrize("field", ["start", "stop", "code", "tiles", "pattern_of"])
@given(data=st.data())
def test_a_changed_mask_is_noticed(field: str, data: st.DataObject) -> None:
    holder = ANY.runs if field in ("start", "stop", "code") else ANY
    array = getattr(holder, field).copy()
    at = data.draw(st.integers(0, array.size - 1))
    # A code or a bit may be changed into another mask, which is as good as the first: take what cannot be.
    if field == "tiles":
        array.reshape(len(array), -1)[at % len(array)] = data.draw(st.sampled_from([0, 0xFFFFFFFF]))
    elif field == "code":
        array[at] = data.draw(st.sampled_from([-1, 0, 2 + len(ANY.tiles), 1 << 20]))
    elif field == "pattern_of":
        array.flat[at] = data.draw(st.sampled_from([-1, 2, 7]))
    else:
        array[at] += data.draw(st.sampled_from([-1, 1])) * (1 << 20)
    with pytest.raises(ValueError, match="the mask is damaged"):
        _with(ANY, field, array).check()


def test_a_tile_that_stands_there_twice_is_noticed() -> None:
    mask = P.local(3).compile(64, block=16)
    with pytest.raises(ValueError, match="tile 1 stands there once"):
        _with(mask, "tiles", mask.tiles[[0, 0, *range(2, len(mask.tiles))]]).check()


def test_an_array_that_can_be_written_to_is_noticed() -> None:
    with pytest.raises(ValueError, match="tiles is read-only"):
        replace(ANY, tiles=ANY.tiles.copy()).check()


@pytest.mark.parametrize("bit", [16, 31])
def test_a_bit_behind_the_end_of_a_block_is_noticed(bit: int) -> None:
    mask = P.local(3).compile(64, block=16)
    tiles = mask.tiles.copy()
    tiles[0, 0, 0] |= np.uint32(1 << bit)
    with pytest.raises(ValueError, match="tile 0 ends with its block"):
        _with(mask, "tiles", tiles).check()


@pytest.mark.parametrize(("shape", "what"), [((40, 64), "rows"), ((64, 20), "columns")])
def test_a_full_block_that_reaches_past_the_end_is_noticed(shape: tuple[int, int], what: str) -> None:
    mask = P.full().compile(shape, block=32)
    mask.check()
    with pytest.raises(ValueError, match=f"no FULL block lies in the ragged last block {what}"):
        _with(mask, "code", np.full_like(mask.runs.code, FULL)).check()


def _with(mask: P.BlockMask, field: str, array: NDArray[Any]) -> P.BlockMask:
    changed: dict[str, Any] = {field: frozen(array)}
    if field in ("start", "stop", "code"):
        changed = {"runs": replace(mask.runs, **changed)}
    return replace(mask, **changed)


@pytest.mark.parametrize("side", ["rows", "columns", "tiles"])
@given(data=st.data())
def test_a_changed_table_is_noticed(side: str, data: st.DataObject) -> None:
    mask = data.draw(st.sampled_from([HEAVY, ANY]))
    table = sf.lookup(mask)
    held: BlockLists | Tiles = getattr(table, side)
    field = data.draw(st.sampled_from(held._fields))
    tensor = getattr(held, field).clone()
    at = data.draw(st.integers(0, tensor.numel() - 1)) if tensor.numel() else 0
    assume(tensor.numel() and (isinstance(held, Tiles) or _used(held, field, at)))
    tensor.view(-1)[at] += data.draw(st.sampled_from([-1, 1]) | st.integers(-(1 << 30), 1 << 30).filter(bool))
    changed = replace(table, **{side: held._replace(**{field: tensor})})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the table is damaged"):
        changed.check(mask)


def test_the_checker_makes_nothing_as_long_as_a_damaged_table_claims() -> None:
    table = sf.lookup(HEAVY)
    reductions = table.rows.reductions.clone()
    reductions[0, 0, 2] += 1 << 21  # the slot past a line's last
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="is reduced from its slots"):
            replace(table, rows=table.rows._replace(reductions=reductions)).check(HEAVY)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 20e6  # a list of these slots has 80 MB


@pytest.mark.parametrize("field", ["ranges", "order", "work_items", "reductions", "partial_tiles"])
def test_a_tensor_of_another_shape_is_noticed(field: str) -> None:
    table = sf.lookup(HEAVY)
    tensor = getattr(table.rows, field)
    longer = torch.cat([tensor, tensor.new_zeros((*tensor.shape[:-1], 1))], -1)
    with pytest.raises(ValueError, match="the table is damaged"):
        replace(table, rows=table.rows._replace(**{field: longer})).check()


def _used(side: BlockLists, field: str, at: int) -> bool:
    """Whether some line lists the entry: others are read ahead at most, and any block will do there."""
    if field not in ("full_indices", "partial_indices", "partial_tiles"):
        return True
    start, stop = side.ranges[..., :2].unbind(-1) if field == "full_indices" else side.ranges[..., 2:].unbind(-1)
    return bool(((start <= at) & (at < stop)).any())


def test_every_table_is_checked_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEFLASH_DEBUG", "1")
    good = P.local(3).compile(90, block=16)
    sf.lookup(good)
    bad = replace(good, runs=good.runs.mapped(np.array([0, 1, 99, 3, 4, 5, 6, 7], np.int32)))
    with pytest.raises(ValueError, match="the mask is damaged"):
        sf.lookup(bad)
