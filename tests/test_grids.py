"""Patterns of lines, images and videos against their definitions, written pair by pair from the sources they name."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseflash import patterns as P
from sparseflash.ordering import ORDERS, token_order
from sparseflash.patterns import Pattern

Seen = Callable[[int, int], bool]

# One axis of five places (eight with a dilation): which keys the queries see, worked out by hand from the definition.
BY_HAND: list[tuple[dict[str, Any], list[str]]] = [
    ({"kernel_size": 3}, ["###..", "###..", ".###.", "..###", "..###"]),
    ({"kernel_size": 3, "border": "clip"}, ["##...", "###..", ".###.", "..###", "...##"]),
    ({"kernel_size": 2}, ["##...", "##...", ".##..", "..##.", "...##"]),
    ({"kernel_size": 4, "border": "clip"}, ["##...", "###..", "####.", ".####", "..###"]),
    ({"kernel_size": 3, "stride": 2}, ["###..", "###..", "..###", "..###", "..###"]),
    ({"kernel_size": 3, "stride": 3, "border": "clip"}, ["###..", "###..", "###..", "...##", "...##"]),
    ({"kernel_size": 3, "is_causal": True}, ["#....", "##...", "###..", ".###.", "..###"]),
    ({"kernel_size": 3, "stride": 2, "is_causal": True}, ["#....", "##...", ".##..", ".###.", "..###"]),
    (
        {"kernel_size": 3, "dilation": 2},
        ["#.#.#...", ".#.#.#..", "#.#.#...", ".#.#.#..", "..#.#.#.", "...#.#.#", "..#.#.#.", "...#.#.#"],
    ),
    (
        {"kernel_size": 2, "dilation": 3},
        ["#..#....", ".#..#...", "..#..#..", "#..#....", ".#..#...", "..#..#..", "...#..#.", "....#..#"],
    ),
]


@pytest.mark.parametrize(("options", "rows"), BY_HAND, ids=str)
def test_windows_worked_out_by_hand(options: dict[str, Any], rows: list[str]) -> None:
    n = len(rows)
    expected = np.array([[seen == "#" for seen in row] for row in rows])
    pattern = P.neighborhood((n,), **options)
    np.testing.assert_array_equal(pattern.compile(n, block=16).to_dense(), expected)
    # The same along one axis of an image, in the middle of another axis along which a window of three sees everything.
    other = {"kernel_size": 3, "stride": 1, "dilation": 1, "is_causal": False}
    both: dict[str, Any] = {name: (other[name], value) if name in other else value for name, value in options.items()}
    image = P.neighborhood((3, n), **both).compile(3 * n, block=16).to_dense()
    np.testing.assert_array_equal(image[n : 2 * n, n : 2 * n], expected)


def window_along(n: int, w: int, s: int, d: int, causal: bool, shift: bool) -> np.ndarray:
    """What places of one axis see, pair by pair."""
    seen = np.zeros((n, n), bool)
    for q, k in itertools.product(range(n), range(n)):
        if q % d != k % d:
            continue
        i, j = q // d, k // d
        last = (n - 1 - q % d) // d
        if causal:
            leader = min(s * (i // s) + s - 1, last)
            seen[q, k] = j <= i and leader - j < w
        else:
            centre = min(s * (i // s) + s // 2, last)
            if shift:
                centre = min(max(centre, w // 2), last - (w // 2 - 1 + w % 2))
            seen[q, k] = centre - w // 2 <= j <= centre + w // 2 - 1 + w % 2
    return seen


@st.composite
def small_windows(draw: st.DrawFn) -> tuple[Pattern, np.ndarray]:
    axes = draw(st.integers(1, 3))
    shape = tuple(draw(st.integers(1, (40, 12, 6)[axes - 1])) for _ in range(axes))
    border = draw(st.sampled_from(["clip", "shift"]))
    along, options = [], []
    for n in shape:
        d = draw(st.integers(1, n))
        causal = draw(st.booleans())
        w = draw(st.integers(1, n // d if border == "shift" and not causal else n + 2))
        s = draw(st.integers(1, w))
        along.append(window_along(n, w, s, d, causal, border == "shift"))
        options.append((w, s, d, causal))
    seen = np.ones((1, 1), bool)
    for axis in along:
        seen = np.kron(seen, axis)
    order, tile = draw(st.sampled_from(ORDERS)), tuple(draw(st.integers(1, n)) for n in shape)
    size, stride, dilation, causal_axes = zip(*options, strict=True)
    pattern = P.neighborhood(
        shape, kernel_size=size, stride=stride, dilation=dilation, is_causal=causal_axes, border=border, order=order,
        tile=tile if order == "tile" else None,
    )  # fmt: skip
    places = token_order(shape, order, tile=tile)[0]
    return pattern, seen[np.ix_(places, places)]


@given(small_windows(), st.sampled_from([16, 32]))
def test_windows_are_those_of_the_definition(case: tuple[Pattern, np.ndarray], block: int) -> None:
    pattern, expected = case
    np.testing.assert_array_equal(pattern.compile(len(expected), block=block).to_dense(), expected)
    assert P.parse(str(pattern)) == pattern


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(ORDERS))
def test_whole_tiles_are_windows_with_a_stride_of_the_tile(
    tile: int, other: int, tiles: int, more: int, order: str
) -> None:
    shape, window = (tile * (2 * tiles + more), other * (2 * tiles + 1)), 2 * tiles - 1
    sliding = P.sliding_tile(shape, (tile, other), window, order)
    steps = P.neighborhood(
        shape, kernel_size=(tile * window, other * window), stride=(tile, other), order=order,
        tile=(tile, other) if order == "tile" else None,
    )  # fmt: skip
    n = shape[0] * shape[1]
    assert sliding.compile(n, block=16) == steps.compile(n, block=16)


def test_blocks_of_one_tile_are_seen_whole() -> None:
    for window in (3, (1, 3, 5), (2, 4, 5)):
        shape = (8, 16, 20) if window == (2, 4, 5) else (12, 20, 24)
        mask = P.sliding_tile(shape, (4, 4, 4), window).compile(int(np.prod(shape)), block=64)
        assert mask.nnz == mask.full_blocks > 0


def tile_seen(q: int, k: int) -> bool:
    """A line of 23 places in tiles of 4, the last of 3; windows of three tiles, moved inwards at the ends."""
    return abs(min(max(q // 4, 1), 4) - k // 4) <= 1


def radial_seen(q: int, k: int, tokens: int, decay: float, near: int, narrowest: int) -> bool:
    """By the names of radial_attn/attn_mask.py: its window width, and its split of distant frames."""
    (i, x), (j, y) = divmod(q, tokens), divmod(k, tokens)
    dist = abs(i - j)
    if j == 0 or dist == 0:
        return True
    decay_length = 2 ** tokens.bit_length() / 2 ** dist.bit_length()
    width = near if dist == 1 else max(decay_length * decay, narrowest)
    split = decay_length >= narrowest or dist % int(narrowest / decay_length) == 0
    return abs(x - y) <= width and split


def spatial_seen(q: int, k: int) -> bool:
    return abs(q // 7 - k // 7) <= 2 or k < 7


def temporal_seen(q: int, k: int) -> bool:
    return abs(q % 7 - k % 7) <= 1 or k < 7


DEFINITIONS: list[tuple[Pattern, int, Seen]] = [
    (P.sliding_tile((23,), (4,), 3), 23, tile_seen),
    (P.spatial(9, 7, 2), 63, spatial_seen),
    (P.spatial(9, 7, 0, first=False), 63, lambda q, k: q // 7 == k // 7),
    (P.temporal(9, 7, 1), 63, temporal_seen),
    (P.temporal(9, 7, first=False), 63, lambda q, k: q % 7 == k % 7),
    (P.radial(9, 13, narrowest=2), 117, lambda q, k: radial_seen(q, k, 13, 1.0, 6, 2)),
    (P.radial(9, 13, decay=0.3, neighbors=13, narrowest=4), 117, lambda q, k: radial_seen(q, k, 13, 0.3, 13, 4)),
    (P.radial(18, 5), 90, lambda q, k: radial_seen(q, k, 5, 1.0, 2, 128)),
    (P.radial(1, 20), 20, lambda q, k: True),
    (P.columns([3, 40, 41, 99]), 60, lambda q, k: k in (3, 40, 41)),
    (P.diagonals([0, 5, -30]), 60, lambda q, k: q - k in (0, 5, -30)),
    (P.axial((3, 4, 5)), 60, lambda q, k: sum(a != b for a, b in zip(place(q), place(k), strict=True)) <= 1),
    (P.neighborhood((3, 4, 5), (1, 0, 2)), 60, lambda q, k: near(place(q), place(k), (1, 0, 2))),
    (P.neighborhood((60,), 4), 60, lambda q, k: abs(q - k) <= 4),
]


def place(position: int) -> tuple[int, int, int]:
    return position // 20, position // 5 % 4, position % 5


def near(q: tuple[int, ...], k: tuple[int, ...], reach: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= r for a, b, r in zip(q, k, reach, strict=True))


@pytest.mark.parametrize(("pattern", "n", "definition"), DEFINITIONS, ids=[str(p) for p, _, _ in DEFINITIONS])
def test_definition(pattern: Pattern, n: int, definition: Seen) -> None:
    expected = [[definition(q, k) for k in range(n)] for q in range(n)]
    np.testing.assert_array_equal(pattern.compile(n, block=16).to_dense(), expected)
    np.testing.assert_array_equal(pattern.allows(np.arange(n)[:, None], np.arange(n)), expected)
    assert P.parse(str(pattern)) == pattern


@given(
    st.integers(1, 90), st.integers(2, 6), st.integers(0, 99), st.sampled_from([16, 32, (16, 64)]),
    st.integers(0, 40), st.sampled_from([0.2, 0.7, 1.0]),
)  # fmt: skip
def test_cells_that_blocks_do_not_divide(
    unit: int, side: int, seed: int, block: int | tuple[int, int], offset: int, density: float
) -> None:
    cells = np.random.default_rng(seed).random((side, side)) < density
    dense = cells.repeat(unit, 0).repeat(unit, 1)
    offset %= unit * side
    mask = P.from_blocks(cells, unit).compile((unit * side - offset, unit * side), block=block, q_offset=offset)
    np.testing.assert_array_equal(mask.to_dense(), dense[offset:])
    mask.check()


def test_equal_windows_have_equal_text() -> None:
    one = P.neighborhood((4, 6), kernel_size=(3, 3), stride=(1, 1), is_causal=(True, True), border="shift")
    assert one == P.neighborhood((4, 6), kernel_size=3, is_causal=True)
    assert str(one) == "neighborhood((4, 6), kernel_size=3, is_causal=True)"
    assert P.neighborhood((8, 8), 1, "tile", tile=(8, 8)) == P.neighborhood((8, 8), 1, "tile")
    assert str(P.neighborhood((8, 8), (1, 2), "tile", tile=(2, 4))) == (
        "neighborhood((8, 8), (1, 2), order='tile', tile=(2, 4))"
    )


REFUSED: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: P.neighborhood((4, 4)), ValueError, "give a radius or a kernel_size"),
    (lambda: P.neighborhood((4, 4), 1, kernel_size=3), ValueError, "give a radius or a kernel_size"),
    (lambda: P.neighborhood((4, 4), 1, stride=2), ValueError, "write kernel_size=3 instead of radius=1"),
    (lambda: P.neighborhood((4, 4), (1, 0), border="shift"), ValueError, r"kernel_size=\(3, 1\) instead"),
    (
        lambda: P.neighborhood((4, 9), kernel_size=(3, 5), dilation=(1, 2)),
        ValueError,
        r"window of 5 does not fit axis 1 of 9 places, 4 of them a dilation of 2 apart; .*kernel_size=\(3, 4\)",
    ),
    (
        lambda: P.neighborhood((8, 9), kernel_size=10),
        ValueError,
        r"axis 0 of 8 places; nearest is kernel_size=\(8, 9\)",
    ),
    (lambda: P.neighborhood((4, 9), kernel_size=3, stride=(1, 4)), ValueError, r"axis 1, got 4.* is stride=\(1, 3\)"),
    (lambda: P.neighborhood((4, 9), kernel_size=1, dilation=(5, 1)), ValueError, r"axis 0, got 5; .*dilation=\(4, 1\)"),
    (lambda: P.neighborhood((4, 4), kernel_size=0), ValueError, "kernel_size must be at least 1"),
    (lambda: P.neighborhood((4, 4), kernel_size=(3, 0)), ValueError, r"kernel_size\[1\] must be at least 1"),
    (lambda: P.neighborhood((4, 4), kernel_size=(3, 3, 3)), TypeError, "one for each of the 2"),
    (lambda: P.neighborhood((4, 4), kernel_size=3, is_causal=1), TypeError, "True or False, got 1"),  # type: ignore[arg-type]
    (lambda: P.neighborhood((4, 4), kernel_size=3, border="wrap"), ValueError, "one of clip, shift; got 'wrap'"),
    (lambda: P.neighborhood((4, 4), 1, tile=(2, 2)), ValueError, "tile=.* is for order='tile', got order='raster'"),
    (lambda: P.neighborhood((4, 4), 1, "tile", tile=(2, 2, 2)), TypeError, "tile must be one for all axes"),
    (lambda: P.neighborhood((4, 4, 4, 4), 1), TypeError, "shape must be 1 to 3 ints"),
    (lambda: P.neighborhood(16, 1), TypeError, "shape must be 1 to 3 ints"),  # type: ignore[arg-type]
    (lambda: P.neighborhood((4, 4), 1).compile(19), ValueError, r"3 over\. .*write beside\(pattern, before=n\)"),
    (lambda: P.sliding_tile((8, 8), (2, 2), 2), ValueError, r"odd along axis 0.* got 2; nearest is window=3"),
    (lambda: P.sliding_tile((8, 8), (2, 2), (3, 5)), ValueError, r"tiles of 2 along axis 1, got 5; .*=\(3, 4\)"),
    (lambda: P.sliding_tile((8, 8), (2, 0), 3), ValueError, r"tile\[1\] must be at least 1"),
    (lambda: P.radial(4, 16, decay=0), ValueError, "decay must be positive"),
    (lambda: P.radial(4, 16, decay="1"), TypeError, "decay must be a number"),  # type: ignore[arg-type]
    (lambda: P.radial(0, 16), ValueError, "frames must be at least 1"),
    (lambda: P.spatial(4, 16, first=1), TypeError, "first must be True or False"),  # type: ignore[arg-type]
    (lambda: P.spatial(4, 16).compile(65), ValueError, "a grid of 4 x 16 has 64 tokens; the sequence has 65, 1 over"),
    (lambda: P.columns([]), ValueError, "at least one of the positions"),
    (lambda: P.columns([-1]), ValueError, "each of the positions must be at least 0"),
    (lambda: P.columns(3), TypeError, "positions must be ints such as"),  # type: ignore[arg-type]
    (lambda: P.diagonals([0.5]), TypeError, "each of the distances must be an int"),  # type: ignore[list-item]
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[w for _, _, w in REFUSED])
def test_what_cannot_be_is_refused(call: Callable[[], object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()
