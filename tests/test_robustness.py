"""Patterns of users who read the contract loosely, arguments at the edge of what numbers hold, and shared state."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.sparse import coo_array

from sparseflash import patterns as P
from sparseflash.patterns import overlay
from sparseflash.patterns.runs import Runs, distinct
from tests.strategies import Shape, expressions, per_head, shapes


@dataclass(frozen=True, repr=False)
class Near(P.Pattern):
    """abs(q - k) < 20, with candidates and keys as loose as a user may write them."""

    style: str

    def allows(self, q: Any, k: Any) -> Any:
        return abs(q - k) < 20

    def candidates(self, grid: P.Grid) -> Any:
        rows = np.arange(grid.rows)
        row, col = np.repeat(rows, 5), (rows[:, None] + np.arange(-2, 3)).ravel()
        if self.style == "lists":
            return row.tolist(), col.tolist()
        if self.style == "shuffled":
            order = np.random.default_rng(0).permutation(row.size)
            return row[order], col[order]
        return row, col

    def keys(self, grid: P.Grid, rows: Any, cols: Any) -> Any:
        if self.style == "narrow":
            return ((cols - rows) * 60).astype(np.int8)
        return (cols - rows).tolist()


@pytest.mark.parametrize("style", ["outside", "lists", "shuffled", "narrow"])
def test_candidates_and_keys_may_be_loose(style: str) -> None:
    mask = Near(style).compile(100, block=16)
    assert mask == P.local(19).compile(100, block=16)
    assert mask.nnz == P.local(19).compile(100, block=16).nnz


def test_candidates_and_keys_of_other_kinds_are_refused() -> None:
    @dataclass(frozen=True, repr=False)
    class Floats(Near):
        def keys(self, grid: P.Grid, rows: Any, cols: Any) -> Any:
            return (cols - rows) / 2

    with pytest.raises(TypeError, match="keys must give ints, got float64"):
        Floats("outside").compile(100, block=16)


def test_huge_cells_do_not_wrap_around() -> None:
    for unit in (1 << 31, 1 << 40):
        pattern = P.fixed(1 << 33, 0, unit)
        assert pattern.compile(64, block=16) == P.full().compile(64, block=16)
    assert P.butterfly(unit=1 << 40).compile(64, block=16) == P.full().compile(64, block=16)


def test_more_pairs_than_an_int64_counts() -> None:
    mask = P.per_sample(*[P.full(), P.causal()] * 4).compile((1 << 22, 1 << 40), block=256)
    assert mask.tokens > 1 << 63
    assert 0.99 < mask.token_density <= 1


def test_long_stretches_of_fixed_stay_runs() -> None:
    mask = P.fixed(1024, 0, 128).compile(1 << 22)
    assert len(mask.runs) == 1 << 15
    assert mask == P.documents([1024 * 128] * 32).compile(1 << 22)


def test_cached_masks_cannot_be_changed() -> None:
    mask = P.random_blocks(2, unit=7).compile(900, block=64)
    image = P.neighborhood((32, 32), 2, "morton").compile(1024, block=64)
    held = [mask.runs.start, mask.runs.row, mask.runs.begin, mask.row_counts, mask.tiles, mask.pattern_of]
    for array in (*held, image.tiles, image.runs.code):
        base: Any = array
        while isinstance(base, np.ndarray):
            with pytest.raises(ValueError, match="read-only"):
                base[...] = 0
            base = base.base


def test_one_file_may_be_saved_by_many_at_once(tmp_path: Path) -> None:
    mask = P.causal().compile(500, block=32)
    path = tmp_path / "m.safetensors"
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: mask.save(path), range(200)))
    assert P.BlockMask.load(path) == mask
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="no folder"):
        mask.save(tmp_path / "absent" / "m.safetensors")


@given(expressions() | per_head(2), expressions(), shapes(300), st.integers(1, 40))
def test_matrices_are_refined_in_portions(a: P.Pattern, b: P.Pattern, shape: Shape, at_once: int) -> None:
    first, second = shape.compile(a), shape.compile(b)
    whole = first & second, first - second, first.transposed()
    with patch.object(overlay, "JUMPS_AT_ONCE", at_once):
        assert (first & second, first - second, first.transposed()) == whole


CODES = st.sampled_from([0, 0, 1, 2, 3, (1 << 15) - 1, 1 << 15, (1 << 31) - 1])
matrices = st.tuples(st.integers(1, 6), st.integers(1, 9)).flatmap(
    lambda shape: st.lists(arrays(np.int32, shape, elements=CODES), min_size=2, max_size=2)
)


@given(matrices, st.integers(1, 40))
def test_codes_of_any_size_are_kept(pair: list[NDArray[np.int32]], at_once: int) -> None:
    a, b = (Runs.from_blocks((each.shape[0], each.shape[1]), *_blocks(each)) for each in pair)
    with patch.object(overlay, "JUMPS_AT_ONCE", at_once):
        down = overlay.transposed(a)
        stacked = overlay.transposed(Runs(a.shape, a.start, a.stop, a.code), a.shape[0])
        both, of_a, of_b = overlay.overlay(a, b)
    np.testing.assert_array_equal(_matrix(down), pair[0].T)
    np.testing.assert_array_equal(_matrix(stacked), pair[0].reshape(-1, 1))
    at = both.blocks()[:2]
    for expected, codes in zip(pair, (of_a, of_b), strict=True):
        found = np.zeros_like(expected)
        found[at] = codes[both.blocks()[2]]
        np.testing.assert_array_equal(found, expected)


def _blocks(matrix: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
    rows, cols = np.nonzero(matrix)
    return rows.astype(np.int64), cols.astype(np.int64), matrix[rows, cols]


def _matrix(runs: Runs) -> NDArray[np.int32]:
    rows, cols, codes = runs.blocks()
    whole = np.zeros(runs.shape, np.int32)
    whole[rows, cols] = codes
    return whole


def test_documents_take_what_flash_attention_takes() -> None:
    expected = P.documents([3, 5])
    for cumulative in (torch.tensor([0, 3, 8], dtype=torch.int32), np.array([0, 3, 8]), [0, 3, 8]):
        assert P.documents(cu_seqlens=cumulative) == expected
    assert P.documents(torch.tensor([3, 5])) == expected


def test_cells_stored_twice_are_summed() -> None:
    twice = coo_array((np.array([1.0, -1.0, 1.0]), (np.array([0, 0, 1]), np.array([0, 0, 1]))), shape=(2, 2))
    assert P.from_blocks(twice, unit=16).compile(32, block=16).nnz == 1


def test_positions_of_any_int_type() -> None:
    q: Any = np.arange(9, dtype=np.int32)[:, None]
    k: Any = np.arange(9, dtype=np.int32)
    for pattern in (P.full(), P.causal(), P.local(2), P.documents([4, 5]), P.butterfly(unit=2)):
        np.testing.assert_array_equal(pattern.allows(q, k), pattern.compile(9, block=16).to_dense())


def test_runs_lie_beside_others_only_where_no_block_is_in_both() -> None:
    def runs(*stretches: tuple[int, int]) -> Runs:
        start, stop = np.array(stretches, np.int64).T
        return Runs((2, 10), start, stop, np.full(len(stretches), 1, np.int32))

    some = runs((0, 2), (5, 7), (12, 14))
    beside = some.beside(runs((2, 5), (14, 20)))
    assert beside is not None
    assert beside.start.tolist() == [0, 2, 5, 12, 14]
    assert some.beside(runs((2, 4), (6, 8), (16, 18))) is None  # one block of many


@given(arrays(np.int64, st.integers(0, 30), elements=st.integers(-40, 40)), st.sampled_from([1, 1 << 40]))
def test_distinct_values_and_where_each_stands(values: NDArray[np.int64], apart: int) -> None:
    """Close together they are counted, far apart sorted."""
    found, index = distinct(values * apart)
    expected, place = np.unique(values * apart, return_inverse=True)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(index, place)
