"""Laws of token orders."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseflash.ordering import ORDERS, token_order


@st.composite
def grids(draw: st.DrawFn) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    axes = draw(st.integers(1, 3))
    side = st.integers(1, (400, 24, 9)[axes - 1])
    shape, tile = (tuple(draw(side) for _ in range(axes)) for _ in range(2))
    return shape, draw(st.sampled_from(ORDERS)), tile


@given(grids())
def test_order_is_a_permutation_with_its_inverse(grid: tuple[tuple[int, ...], str, tuple[int, ...]]) -> None:
    shape, order, tile = grid
    places, positions = token_order(shape, order, tile=tile)
    everything = np.arange(np.prod(shape))
    assert places.dtype == positions.dtype == np.int64
    np.testing.assert_array_equal(np.sort(places), everything)
    np.testing.assert_array_equal(places[positions], everything)
    np.testing.assert_array_equal(positions[places], everything)


@given(grids())
def test_tiles_follow_each_other_row_by_row(grid: tuple[tuple[int, ...], str, tuple[int, ...]]) -> None:
    shape, _, tile = grid
    at = np.unravel_index(token_order(shape, "tile", tile=tile)[0], shape)
    keys = [[*(int(x) // t for x, t in zip(place, tile, strict=True)), *map(int, place)] for place in np.transpose(at)]
    assert keys == sorted(keys)


@given(grids())
def test_steps_along_a_hilbert_curve_stay_near(grid: tuple[tuple[int, ...], str, tuple[int, ...]]) -> None:
    """To a neighbour where all sides are even or one, and never farther than to a place that touches."""
    shape = grid[0]
    steps = np.abs(np.diff(np.stack(np.unravel_index(token_order(shape, "hilbert")[0], shape)), axis=1))
    assert steps.max(initial=0) <= 1
    if all(side % 2 == 0 for side in shape):
        assert (steps.sum(axis=0) == 1).all()


@pytest.mark.parametrize("side", [1, 2, 4, 8, 32])
def test_the_curve_of_a_square_is_hilberts(side: int) -> None:
    """Quadrant by quadrant: down, right and up again, each a turned copy of the curve."""
    expected = [(0, 0)]
    size = 1
    while size < side:
        s = size
        first = [(x, y) for y, x in expected]
        last = [(s - 1 - x, 2 * s - 1 - y) for y, x in expected]
        expected = [*first, *((y + s, x) for y, x in expected), *((y + s, x + s) for y, x in expected), *last]
        size *= 2
    found = np.divmod(token_order((side, side), "hilbert")[0], side)
    assert list(zip(*(axis.tolist() for axis in found), strict=True)) == expected


def test_small_orders_of_three_axes() -> None:
    """Read off by hand: frames of two rows of three."""
    assert token_order((2, 2, 3), "raster")[0].tolist() == list(range(12))
    assert token_order((2, 2, 3), "tile", tile=(2, 1, 2))[0].tolist() == [0, 1, 6, 7, 2, 8, 3, 4, 9, 10, 5, 11]
    assert token_order((2, 2, 3), "morton")[0].tolist() == [0, 1, 3, 4, 6, 7, 9, 10, 2, 5, 8, 11]


@pytest.mark.parametrize("log2", range(9))
def test_aligned_runs_in_morton_order_are_compact_rectangles(log2: int) -> None:
    pixels, _ = token_order((64, 96), "morton")
    for run in pixels.reshape(-1, 2**log2):
        y, x = np.divmod(run, 96)
        assert np.ptp(y) + 1 == 2 ** (log2 // 2)
        assert np.ptp(x) + 1 == 2 ** (log2 - log2 // 2)


def test_tile_order_goes_through_tiles_row_by_row() -> None:
    pixels, _ = token_order((4, 6), "tile", tile=(2, 3))
    assert pixels.reshape(4, 6).tolist() == [
        [0, 1, 2, 6, 7, 8],
        [3, 4, 5, 9, 10, 11],
        [12, 13, 14, 18, 19, 20],
        [15, 16, 17, 21, 22, 23],
    ]


def test_results_are_shared_and_cannot_be_changed() -> None:
    pixels, positions = token_order((4, 4), "morton")
    assert token_order((4, 4), "morton", tile=(3, 3))[0] is pixels
    for array in (pixels, positions):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize(
    ("shape", "order", "words"),
    [
        ((8, 8), "spiral", "order must be one of raster, tile, morton, hilbert; got 'spiral'"),
        ((0, 8), "raster", "at least 1"),
        ((), "raster", "1 to 3 whole numbers"),
        (12, "raster", "1 to 3 whole numbers of at least 1, such as .*; got 12"),
        ((2, 2, 2, 2), "hilbert", "1 to 3 whole numbers"),
        ((2.5, 2), "morton", "1 to 3 whole numbers"),
    ],
)
def test_bad_orders_are_refused(shape: tuple[int, ...], order: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        token_order(shape, order)


def test_a_tile_of_other_axes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"each of the 3 axes of shape=\(4, 4, 4\); got \(8, 8\)"):
        token_order((4, 4, 4), "tile", tile=(8, 8))
