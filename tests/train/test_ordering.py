"""Laws of token orders."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseflash.ordering import ORDERS, token_order


@st.composite
def images(draw: st.DrawFn) -> tuple[tuple[int, int], str, tuple[int, int]]:
    order = draw(st.sampled_from(ORDERS))
    if order == "hilbert":
        side = 2 ** draw(st.integers(0, 6))
        return (side, side), order, (1, 1)
    tile = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    height, width = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    return (height * tile[0], width * tile[1]), order, tile


@given(images())
def test_order_is_a_permutation_with_its_inverse(image: tuple[tuple[int, int], str, tuple[int, int]]) -> None:
    shape, order, tile = image
    pixels, positions = token_order(shape, order, tile=tile)
    everything = np.arange(shape[0] * shape[1])
    assert pixels.dtype == positions.dtype == np.int64
    np.testing.assert_array_equal(np.sort(pixels), everything)
    np.testing.assert_array_equal(pixels[positions], everything)
    np.testing.assert_array_equal(positions[pixels], everything)


@pytest.mark.parametrize("log2", range(9))
def test_aligned_runs_in_morton_order_are_compact_rectangles(log2: int) -> None:
    pixels, _ = token_order((64, 96), "morton")
    for run in pixels.reshape(-1, 2**log2):
        y, x = np.divmod(run, 96)
        assert np.ptp(y) + 1 == 2 ** (log2 // 2)
        assert np.ptp(x) + 1 == 2 ** (log2 - log2 // 2)


def test_hilbert_steps_go_to_neighbours() -> None:
    pixels, _ = token_order((32, 32), "hilbert")
    y, x = np.divmod(pixels, 32)
    assert (np.abs(np.diff(y)) + np.abs(np.diff(x)) == 1).all()


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
        ((8, 16), "hilbert", "8 x 16"),
        ((12, 12), "hilbert", "power of two"),
        ((12, 12), "tile", "8 x 8 tiles on a 12 x 12 image"),
        ((0, 8), "raster", "at least 1"),
        ((8,), "raster", "two whole numbers"),
    ],
)
def test_bad_orders_are_refused(shape: tuple[int, int], order: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        token_order(shape, order)
