"""Pictures of masks, pixel by pixel."""

from __future__ import annotations

import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparseflash import patterns as P
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.pictures.drawing import DPI, TITLE_LINES, figure, heading, panel_size, tick_step, whole_multiple
from sparseflash.pictures.pixels import (
    EMPTY_COLOUR,
    FULL_COLOUR,
    LEAST_INK,
    MASKED_COLOUR,
    PARTIAL_COLOUR,
    block_counts,
    block_pixels,
    checked_window,
    enlarged,
    picture,
    png_bytes,
)
from tests.strategies import Shape, expressions, per_head, shapes

PNG = b"\x89PNG\r\n\x1a\n"


def is_colour(pixels: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    found: np.ndarray = (pixels == np.array(colour)).all(axis=-1)
    return found


@st.composite
def windows(draw: st.DrawFn, length: int) -> tuple[int, int]:
    first = draw(st.integers(0, length - 1))
    return first, draw(st.integers(first + 1, length))


@given(expressions() | per_head(2), shapes(300), st.data())
def test_a_window_of_tokens_shows_each_pair(pattern: Pattern, shape: Shape, data: st.DataObject) -> None:
    """Coloured where allowed and only there; FULL and PARTIAL as the codes say; masked pairs only in PARTIAL."""
    mask = shape.compile(pattern)
    window = q, k = data.draw(windows(shape.q_len)), data.draw(windows(shape.kv_len))
    chosen = data.draw(st.integers(0, mask.patterns - 1))
    pixels, covered = picture(mask, chosen, window)
    assert covered == window
    dense = mask.to_dense().reshape(-1, *mask.shape)[int(np.flatnonzero(mask.pattern_of.ravel() == chosen)[0])]
    codes = mask.to_scipy(chosen).toarray().repeat(mask.block[0], 0).repeat(mask.block[1], 1)
    inside = np.s_[slice(*q), slice(*k)]
    dense, codes = dense[inside], codes[inside]
    full, partial, masked, empty = (
        is_colour(pixels, c) for c in (FULL_COLOUR, PARTIAL_COLOUR, MASKED_COLOUR, EMPTY_COLOUR)
    )
    assert np.array_equal(full | partial, dense)
    assert np.array_equal(full, codes == 1)
    assert np.array_equal(partial | masked, codes > 1)
    assert np.array_equal(empty, codes == 0)


@given(expressions() | per_head(2), shapes(600), st.data())
def test_block_pixels_count_what_they_hold(pattern: Pattern, shape: Shape, data: st.DataObject) -> None:
    mask = shape.compile(pattern)
    rows, cols = (data.draw(windows(n)) for n in mask.grid_shape)
    size = data.draw(st.integers(1, rows[1] - rows[0])), data.draw(st.integers(1, cols[1] - cols[0]))
    chosen = data.draw(st.integers(0, mask.patterns - 1))
    counts = block_counts(mask, chosen, rows, cols, size)
    codes = mask.to_scipy(chosen).toarray()[slice(*rows), slice(*cols)]
    line, column = (np.arange(n) * m // n for n, m in zip(codes.shape, size, strict=True))
    for count, here in zip(counts, (codes == 1, codes > 1), strict=True):
        expected = np.zeros(size, int)
        np.add.at(expected, (line[:, None], column[None, :]), here)
        assert np.array_equal(count, expected)
    if size == codes.shape:
        pixels = block_pixels(mask, chosen, rows, cols, size)
        assert np.array_equal(is_colour(pixels, FULL_COLOUR), codes == 1)
        assert np.array_equal(is_colour(pixels, PARTIAL_COLOUR), codes > 1)
        assert np.array_equal(is_colour(pixels, EMPTY_COLOUR), codes == 0)


def test_a_pixel_is_mixed_from_its_blocks_and_paler_the_fewer_are_stored() -> None:
    """2 x 4 blocks per pixel, by hand: ink from 0.6 for next to none to 1 for all, of the mean of their colours."""
    full, partial = np.zeros((2, 4, 8), bool)
    full[:2, :4] = True  # all 8 of the pixel
    full[0, 4:7] = True  # 3 of 8
    full[2, 0] = partial[3, :3] = True  # 1 full and 3 partial of 8
    pattern = P.from_blocks(full, unit=16) | (P.strided(2) & P.from_blocks(partial, unit=16))
    mask = pattern.compile((64, 128), block=16, q_offset=0)
    expected = np.full((2, 2, 3), 255.0)
    expected[0, 0] = (0, 114, 178)
    for place, ink, colour in (((0, 1), 0.75, (0, 114, 178)), ((1, 0), 0.8, (172.5, 147.75, 44.5))):
        expected[place] = 255 + ink * (np.array(colour) - 255)
    assert np.abs(block_pixels(mask, 0, (0, 4), (0, 8), (2, 2)) - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(("side", "lone", "grown"), [(30, 1, True), (30, 2, False), (29, 1, False)])
def test_lone_pixels_grow_over_a_hundredth_of_the_picture_at_most(side: int, lone: int, grown: bool) -> None:
    """One grows to 9 pixels: of 30 x 30 that is a hundredth."""
    blocks = np.zeros((2 * side, 2 * side), bool)
    blocks[[20, 40][:lone], [30, 10][:lone]] = True
    mask = P.from_blocks(blocks, unit=16).compile(32 * side, block=16)
    pixels = block_pixels(mask, 0, (0, 2 * side), (0, 2 * side), (side, side))
    assert (pixels != 255).any(axis=2).sum() == (9 if grown else 1) * lone


@pytest.mark.parametrize("place", [(0, 0), (0, 39), (29, 0), (29, 39), (12, 39), (29, 12), (7, 9)])
def test_a_lone_pixel_grows_by_one_on_each_side_where_the_picture_goes_on(place: tuple[int, int]) -> None:
    blocks = np.zeros((60, 80), bool)
    blocks[2 * place[0] + 1, 2 * place[1]] = True
    mask = P.from_blocks(blocks, unit=16).compile((960, 1280), block=16, q_offset=0)
    inked = (block_pixels(mask, 0, (0, 60), (0, 80), (30, 40)) != 255).any(axis=2)
    rows, cols = np.mgrid[:30, :40]
    assert np.array_equal(inked, (abs(rows - place[0]) <= 1) & (abs(cols - place[1]) <= 1))


def test_only_pixels_without_neighbours_grow() -> None:
    """Two of 60 x 60 pixels: beside each other they stay, with a pixel between them each grows."""
    steps = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3) if (dy, dx) != (0, 0)]
    for dy, dx in steps:
        two = np.zeros((60, 60), bool)
        two[[30, 30 + dy], [20, 20 + dx]] = True
        mask = P.from_blocks(two.repeat(2, axis=0).repeat(2, axis=1), unit=16).compile(1920, block=16)
        inked = (block_pixels(mask, 0, (0, 120), (0, 120), (60, 60)) != 255).any(axis=2)
        if max(abs(dy), abs(dx)) > 1:
            for y, x in ((30, 20), (30 + dy, 20 + dx)):
                two[y - 1 : y + 2, x - 1 : x + 2] = True
        assert np.array_equal(inked, two), (dy, dx)


def million(cells: list[tuple[int, int]]) -> BlockMask:
    """A million tokens, these blocks of 8,192 x 8,192 full."""
    q, k = zip(*cells, strict=True)
    matrix = np.zeros((8192, 8192), bool)
    matrix[list(q), list(k)] = True
    return P.from_blocks(matrix).compile(1 << 20)


def test_single_blocks_of_a_million_tokens_stay_visible() -> None:
    """In the picture and in the file, on the edges too, and as strong as LEAST_INK says."""
    cells = [(1000, 7000), (5001, 300), (0, 8191), (8191, 4000)]
    mask = million(cells)
    pixels, _ = picture(mask)
    assert pixels.shape == (1024, 1024, 3)
    inked = (pixels != 255).any(axis=2)
    for q, k in cells:
        assert inked[max(q // 8 - 1, 0) : q // 8 + 2, max(k // 8 - 1, 0) : k // 8 + 2].all(), "3 x 3, cut at edges"
        assert (255 - pixels[q // 8, k // 8, 0]) >= LEAST_INK * 255
    assert inked.sum() == 9 + 9 + 4 + 6, "nothing else has grown; one is in a corner, one on an edge"


def test_many_single_blocks_do_not_look_like_a_denser_mask() -> None:
    mask = P.random_blocks(1).compile(1 << 20)
    pixels, _ = picture(mask)
    held = sum(block_counts(mask, 0, (0, 8192), (0, 8192), (1024, 1024))) > 0
    assert np.array_equal((pixels != 255).any(axis=2), held)


def test_thin_lines_of_a_million_tokens_have_no_gaps() -> None:
    mask = (P.local(64) | P.butterfly(unit=128) | P.global_tokens(1)).compile(1 << 20)
    pixels, _ = picture(mask)
    inked = (pixels != 255).any(axis=2)
    steps = np.arange(1024)
    for stride in (0, *(1 << s for s in range(10))):
        assert inked[steps, steps ^ stride].all(), stride
    assert inked[0].all()
    assert inked[:, 0].all()


def panel(path: Path, size: int = 1024) -> np.ndarray:
    """The pixels of a plot's one panel: it is found as the only place that holds any of the kinds' colours."""
    pixels = np.asarray(Image.open(path).convert("RGB"))
    inked = np.zeros(pixels.shape[:2], bool)
    for colour in (FULL_COLOUR, PARTIAL_COLOUR):
        inked |= is_colour(pixels, colour)
    inked[-80:] = False  # the legend
    top, left = np.flatnonzero(inked.any(axis=1))[0], np.flatnonzero(inked.any(axis=0))[0]
    return pixels[top : top + size, left : left + size]


def test_no_pixel_of_the_picture_is_lost_on_its_way_to_the_file(tmp_path: Path) -> None:
    """1,024 blocks on a side, one pixel each, in any arrangement."""
    cells = np.random.default_rng(0).random((1024, 1024)) < 0.3
    cells[0, :] = cells[:, 0] = True
    P.from_blocks(cells).compile(1 << 17).plot(tmp_path / "m.png")
    assert np.array_equal(is_colour(panel(tmp_path / "m.png"), FULL_COLOUR), cells)


def test_a_plotted_window_stands_where_its_axes_say(tmp_path: Path) -> None:
    """256 x 256 tokens become 4 x 4 pixels each; borders of blocks are drawn over the outermost."""
    mask = (P.causal() & (P.local(100) | P.strided(64))).compile(4096, block=64)
    (q0, q1), (k0, k1) = window = (1024, 1280), (960, 1216)
    mask.plot(tmp_path / "m.png", window=window)
    dense = mask.to_dense()[q0:q1, k0:k1]
    assert dense[0].any()
    assert dense[:, 0].any()
    centres = panel(tmp_path / "m.png")[2::4, 2::4]
    assert np.array_equal(is_colour(centres, PARTIAL_COLOUR) | is_colour(centres, FULL_COLOUR), dense)
    axes = figure(mask, None, window).axes[0]
    assert (axes.get_ylim(), axes.get_xlim()) == ((q1, q0), (k0, k1))


def test_a_window_too_large_for_tokens_shows_whole_blocks() -> None:
    mask = P.causal().compile(4000, block=64)
    pixels, covered = picture(mask, 0, ((100, 2000), (0, 4000)))
    assert covered == ((64, 2048), (0, 4032))
    assert pixels.shape == (31, 63, 3)
    rows, cols = np.mgrid[1:32, 0:63]
    # The last key column is ragged, but no query of this window sees it.
    assert np.array_equal(is_colour(pixels, FULL_COLOUR), cols < rows)
    assert np.array_equal(is_colour(pixels, PARTIAL_COLOUR), cols == rows)


def test_tokens_are_shown_while_each_pair_has_a_pixel() -> None:
    mask = P.causal().compile((2048, 4096), block=16)
    for window in (((19, 1043), (37, 1061)), ((1, 2), (0, 1024))):
        pixels, covered = picture(mask, 0, window)
        assert covered == window
        assert pixels.shape[:2] == tuple(stop - first for first, stop in window)
    for window in (((19, 1044), (37, 1061)), ((19, 1043), (37, 1062))):
        assert picture(mask, 0, window)[1] == ((16, 1056), (32, 1072)), "one more, and it is whole blocks"


def test_a_picture_takes_the_room_of_each_side() -> None:
    """128 x 256 blocks: as many pixels as there are of either, at most as many as have room."""
    mask = P.causal().compile((2048, 4096), block=16)
    for size, shape in (((40, 60), (40, 60)), ((60, 40), (60, 40)), ((200, 200), (128, 200)), ((40, 300), (40, 256))):
        assert picture(mask, size=size)[0].shape == (*shape, 3)


def test_no_window_is_all_of_the_mask() -> None:
    mask = P.causal().compile((300, 700))
    assert checked_window(mask, None) == ((0, 300), (0, 700))
    assert checked_window(mask, ((0, 300), (0, 700))) == ((0, 300), (0, 700))
    for window, what in ((((0, 301), (0, 700)), "queries 0..301"), (((0, 300), (0, 701)), "keys 0..701")):
        with pytest.raises(ValueError, match=re.escape(what)):
            checked_window(mask, window)


@pytest.mark.parametrize(
    ("window", "kind"),
    [
        (((0, 10), (0, 101)), ValueError),
        (((-1, 10), (0, 100)), ValueError),
        (((5, 5), (0, 100)), ValueError),
        (((0, 100), (60, 30)), ValueError),
        ((0, 100), TypeError),
        (((0, 100),), TypeError),
        (((0.0, 10), (0, 100)), TypeError),
        ("whole", TypeError),
        (7, TypeError),
    ],
)
def test_bad_windows_are_quoted_and_nothing_is_written(tmp_path: Path, window: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=re.escape(f"window={window!r}")):
        P.causal().compile(100).plot(tmp_path / "m.png", window=window)
    assert not list(tmp_path.iterdir())


def test_bad_paths_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    mask = P.causal().compile(100)
    for name in ("m", "m.jpg", "m.png.txt"):
        with pytest.raises(ValueError, match=rf"cannot write '{name}': a picture ends in one of \.png, \.svg, \.pdf"):
            mask.plot(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no folder"):
        mask.plot(tmp_path / "absent" / "m.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "start"), [("m.png", PNG), ("m.SVG", b"<?xml"), ("m.pdf", b"%PDF")])
def test_formats(tmp_path: Path, name: str, start: bytes) -> None:
    P.causal().compile(100).plot(tmp_path / name, title="$ \\frac{ } <b> _x_ " * 40)
    assert (tmp_path / name).read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_axes_are_square_for_square_masks_and_panels_do_not_overlap() -> None:
    for mask in (P.causal().compile(10_000, block=(64, 128)), P.causal().compile(40_000, block=(16, 128))):
        drawn = figure(mask, None, checked_window(mask, None))
        box = drawn.axes[0].get_position().transformed(drawn.transFigure)
        assert box.width == pytest.approx(box.height, rel=0.02)
        assert box.width * DPI / drawn.dpi >= 683
    heads = P.per_head(*(P.local(20 * i) for i in range(1, 12))).compile(2048)
    drawn = figure(heads, "eleven heads", checked_window(heads, None))
    boxes = [a.get_position() for a in drawn.axes]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert "the first 8 of 11 patterns" in drawn.texts[0].get_text()
    decode = P.causal().compile((1, 65536))
    height, width = picture(decode)[0].shape[:2]
    assert (height, width) == (1, 512)


@pytest.mark.parametrize(
    ("pattern", "lengths", "across"),
    [
        (P.causal(), (1000, 1000), 1),
        (P.per_head(*(P.local(20 * i) for i in range(1, 4))), (500, 1500), 3),
        (P.per_head(*(P.local(20 * i) for i in range(1, 7))), (4096, 2048), 4),
    ],
    ids=["one", "three", "six"],
)
def test_everything_has_a_place_of_its_own_in_the_figure(
    pattern: Pattern, lengths: tuple[int, int], across: int
) -> None:
    """Notes above, the legend below, between them labelled panels, at most four in a line; nothing is cut off."""
    mask = pattern.compile(lengths, block=(64, 32))
    drawn = figure(mask, "a title", checked_window(mask, None))
    drawn.canvas.draw()
    (notes,), (legend,), panels = drawn.texts, drawn.legends, drawn.axes
    head, foot = notes.get_window_extent(), legend.get_window_extent()
    labelled = [axes.get_tightbbox() for axes in panels]
    for box in (head, foot, *labelled):
        assert box.x0 >= 0 <= box.y0
        assert box.x1 <= drawn.bbox.x1
        assert box.y1 <= drawn.bbox.y1
    assert all(foot.y1 <= box.y0 and box.y1 <= head.y0 for box in labelled)
    lowest = min(box.y0 for box in labelled)
    assert lowest - foot.y1 < panels[0].get_window_extent().height / 2, "no line of panels is left empty"
    assert not any(a.overlaps(b) for i, a in enumerate(labelled) for b in labelled[:i])
    for box in (head, foot):
        assert (box.x0 + box.x1) / 2 == pytest.approx(drawn.bbox.x1 / 2, abs=1), "in the middle"
    boxes = [axes.get_position().bounds for axes in panels]
    edges = np.array(boxes) * np.tile(drawn.get_size_inches() * DPI, 2)
    assert np.allclose(edges, np.rint(edges), atol=1e-6), "on whole pixels of the file"
    left, bottom, *_ = np.rint(edges).astype(int).T.tolist()
    assert len(set(left)) == across
    assert sorted(range(len(left)), key=lambda i: (-bottom[i], left[i])) == list(range(len(left))), "as one reads"


def test_several_panels_are_half_as_large_as_one() -> None:
    for heads, side in ((1, 1024), (2, 512)):
        mask = P.per_head(*(P.local(i) for i in range(heads))).compile(1 << 17)
        drawn = figure(mask, None, checked_window(mask, None))
        assert [axes.images[0].get_array().shape[:2] for axes in drawn.axes] == [(side, side)] * heads
        assert [axes.get_title() for axes in drawn.axes] == (
            ["pattern 0 of 2", "pattern 1 of 2"] if heads == 2 else [""]
        )


def test_the_legend_explains_the_colours_in_view() -> None:
    mask = P.causal().compile(4096, block=64)
    for window, kinds in (
        (None, [("full", FULL_COLOUR), ("partial", PARTIAL_COLOUR)]),
        (
            ((0, 1024), (0, 1024)),
            [("full block", FULL_COLOUR), ("partial block: allowed", PARTIAL_COLOUR), ("masked", MASKED_COLOUR)],
        ),
    ):
        (legend,) = figure(mask, None, checked_window(mask, window)).legends
        assert [text.get_text() for text in legend.get_texts()] == [name for name, _ in kinds]
        shown = [np.array(patch.get_facecolor()[:3]) * 255 for patch in legend.get_patches()]
        assert np.allclose(shown, [colour for _, colour in kinds])


def test_a_panel_has_the_proportions_of_its_window_down_to_a_quarter() -> None:
    assert panel_size(((0, 300), (0, 300)), 1024) == (1024, 1024)
    assert panel_size(((100, 200), (40, 90)), 1024) == (1024, 512)
    assert panel_size(((0, 1000), (0, 2000)), 512) == (256, 512)
    assert panel_size(((0, 1), (0, 4096)), 1024) == (256, 1024)
    assert panel_size(((0, 3), (0, 7)), 100) == (43, 100), "rounded up"


def test_a_panel_is_a_whole_multiple_of_its_picture_if_that_keeps_its_proportions() -> None:
    assert whole_multiple((100, 100), (1024, 1024)) == (1000, 1000)
    assert whole_multiple((101, 100), (1024, 1024)) == (1010, 1000)
    assert whole_multiple((60, 30), (1024, 512)) == (1020, 510)
    assert whole_multiple((300, 100), (1024, 1024)) == (1024, 1024), "900 x 1000 is no square"
    assert whole_multiple((100, 300), (1024, 1024)) == (1024, 1024)
    assert whole_multiple((1024, 700), (1024, 700)) == (1024, 700)


def test_borders_of_blocks_are_drawn_while_they_are_few() -> None:
    """Those inside the window, and not its edges; up to 32 blocks on a side."""

    def borders(lengths: tuple[int, int], window: Any = None) -> tuple[set[int], set[int]]:
        mask = P.causal().compile(lengths, block=(16, 32))
        lines = figure(mask, None, checked_window(mask, window)).axes[0].get_lines()
        level = [line for line in lines if line.get_ydata()[0] == line.get_ydata()[1]]
        return {line.get_ydata()[0] for line in level}, {line.get_xdata()[0] for line in lines if line not in level}

    assert borders((512, 1024)) == (set(range(16, 512, 16)), set(range(32, 1024, 32)))
    assert borders((513, 1024)) == borders((512, 1025)) == (set(), set())
    assert borders((512, 1024), ((16, 48), (32, 96))) == ({32}, {64})
    assert borders((512, 1024), ((15, 49), (31, 97))) == ({16, 32, 48}, {32, 64, 96})
    assert borders((512, 1024), ((17, 31), (33, 64))) == (set(), set())
    late = borders((2048, 4096), ((1536, 2048), (3072, 4096)))
    assert late == (set(range(1552, 2048, 16)), set(range(3104, 4096, 32)))


def test_the_heading_names_the_window_only_of_a_part() -> None:
    mask = P.causal().compile((300, 700))
    whole = heading(mask, None, ((0, 300), (0, 700)), 1, (300, 700), 1400)
    assert whole == ["blocks 94.44% of 3 x 6 (128 x 128 tokens), tokens 78.64%"]
    for q, k in (((0, 300), (0, 699)), ((0, 299), (0, 700)), ((1, 300), (0, 700)), ((0, 300), (1, 700))):
        part = heading(mask, None, (q, k), 1, (300, 700), 1400)
        assert part == [*whole, f"queries {q[0]} to {q[1] - 1}, keys {k[0]} to {k[1] - 1}"]


def test_a_title_takes_five_lines_of_the_figures_width_at_most() -> None:
    mask = P.causal().compile(100)
    window = checked_window(mask, None)
    words = " ".join(["word"] * 100)  # 20 of them in a line of 100 letters
    assert heading(mask, words, window, 1, (100, 100), 1400)[:-1] == [" ".join(["word"] * 20)] * TITLE_LINES
    cut = heading(mask, words + " more", window, 1, (100, 100), 1400)[:-1]
    assert len(cut) == TITLE_LINES == 5
    assert cut[-1].endswith("word ...")
    assert heading(mask, words, window, 1, (100, 100), 2800)[0] == " ".join(["word"] * 40)
    assert len(heading(mask, None, window, 1, (100, 100), 1400)) == 1


def test_the_heading_says_how_many_blocks_a_pixel_holds() -> None:
    mask = P.causal().compile((8192, 16384), block=16)
    lines = heading(mask, None, ((0, 8192), (0, 16384)), 1, (256, 256), 1400)
    assert lines[-1] == "a pixel holds 2 x 4 blocks: the paler, the fewer of them are stored"
    assert len(heading(mask, None, ((0, 8192), (0, 16384)), 1, (512, 1024), 1400)) == 1, "a pixel is a block"
    part = heading(mask, None, ((0, 4096), (4096, 8192)), 1, (256, 256), 1400)
    assert part[-1] == "queries 0 to 4,095, keys 4,096 to 8,191"
    odd = heading(mask, None, ((8, 4088), (24, 8200)), 1, (256, 256), 1400)
    assert odd[-1] == "a pixel holds 1 x 2 blocks: the paler, the fewer of them are stored", "256 and 512 are touched"
    wide = heading(mask, None, ((0, 4096), (0, 16384)), 1, (256, 512), 1400)
    assert wide[-1] == "a pixel holds 1 x 2 blocks: the paler, the fewer of them are stored", "one side is enough"


def test_ticks_are_powers_of_two_with_room_for_their_labels() -> None:
    assert tick_step(1 << 20, 1024) == 1 << 17
    assert tick_step(300, 900) == 64
    assert tick_step(1, 1024) == 1
    assert tick_step(2, 120) == 1
    assert tick_step(3, 120) == 2
    mask = P.causal().compile(1 << 20)
    drawn = figure(mask, None, checked_window(mask, None))
    drawn.canvas.draw()
    for axis in (drawn.axes[0].xaxis, drawn.axes[0].yaxis):
        labels = [t.get_text() for t in axis.get_ticklabels()]
        assert "131,072" in labels
        assert "1,048,576" in labels
    boxes = [t.get_window_extent() for t in drawn.axes[0].get_xticklabels() if 0 <= t.get_position()[0] <= 1 << 20]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
    assert boxes[-1].x1 < drawn.bbox.x1


def test_each_axis_has_the_ticks_of_its_own_length() -> None:
    mask = P.causal().compile((1024, 1 << 16), block=(16, 128))
    drawn = figure(mask, None, checked_window(mask, None))
    drawn.canvas.draw()
    queries, keys = (
        [t.get_text() for t in axis.get_ticklabels()] for axis in (drawn.axes[0].yaxis, drawn.axes[0].xaxis)
    )
    assert "1,024" in queries
    assert "65,536" in keys
    assert "65,536" not in queries
    axes = drawn.axes[0]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("query token", "key token")
    assert "512" in queries
    assert "256" not in queries, "a panel of 256 pixels has room for three labels"
    drawn = figure(mask, None, ((768, 1024), (65_280, 65_536)))
    drawn.canvas.draw()
    assert "65,312" in [t.get_text() for t in drawn.axes[0].xaxis.get_ticklabels()], "as close far from the first key"
    small = P.causal().compile((48, 128), block=(16, 64))  # few blocks: their borders are drawn
    lines = figure(small, None, checked_window(small, None)).axes[0].get_lines()
    assert sorted({tuple(line.get_ydata()) for line in lines if line.get_ydata()[0] == line.get_ydata()[1]}) == [
        (16, 16), (32, 32),
    ]  # fmt: skip
    assert {tuple(line.get_xdata()) for line in lines if line.get_xdata()[0] == line.get_xdata()[1]} == {(64, 64)}


def test_colours_differ_in_grey() -> None:
    """By luminance (ITU-R BT.709) neighbours of the scale empty, masked, partial, full are told apart."""
    colours = (EMPTY_COLOUR, MASKED_COLOUR, PARTIAL_COLOUR, FULL_COLOUR)
    grey = [np.dot(colour, (0.2126, 0.7152, 0.0722)) for colour in colours]
    assert all(a - b >= 12 for a, b in pairwise(grey))
    assert grey[2] - grey[3] >= 60


def test_colours_are_the_published_ones() -> None:
    """White, then #0072B2 and #E69F00: blue and orange of Okabe & Ito, Color Universal Design (2002)."""
    assert EMPTY_COLOUR == (0xFF, 0xFF, 0xFF)
    assert FULL_COLOUR == (0x00, 0x72, 0xB2)
    assert PARTIAL_COLOUR == (0xE6, 0x9F, 0x00)


def test_up_to_256_colours_make_a_palette() -> None:
    """A PNG's palette holds 256: one colour more, and pixels hold their colours themselves."""
    for colours, mode in ((1, "P"), (256, "P"), (257, "RGB")):
        pixels = np.zeros((1, colours, 3), np.uint8)
        pixels[0, :, 1], pixels[0, :, 2] = np.divmod(np.arange(colours), 200)
        image = Image.open(BytesIO(png_bytes(pixels)))
        assert image.mode == mode
        assert np.array_equal(np.asarray(image.convert("RGB")), pixels)


def test_small_pictures_are_enlarged_by_whole_pixels() -> None:
    for shape, times in (((2, 3), 107), ((3, 1), 107), ((64, 50), 5), ((300, 2), 1), ((2, 900), 1)):
        pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype(np.uint8)
        assert np.array_equal(enlarged(pixels, 320), np.kron(pixels, np.ones((times, times, 1), np.uint8)))


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 5))
def test_png_bytes_are_the_pixels(height: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    few = random.integers(0, 2, (height, width, 3)).astype(np.uint8) * 255
    for pixels in (few, random.integers(0, 256, (40, 40, 3)).astype(np.uint8)):
        again = np.asarray(Image.open(BytesIO(png_bytes(pixels))).convert("RGB"))
        assert np.array_equal(again, pixels)


def test_the_notebook_picture_is_small_and_right() -> None:
    mask = P.causal().compile(4096, block=64)
    content = mask._repr_png_()
    assert content.startswith(PNG)
    assert len(content) < 2000
    image = np.asarray(Image.open(BytesIO(content)).convert("RGB"))
    assert image.shape == (322, 322, 3), "64 blocks of 5 pixels in a frame"
    blocks = image[1:-1, 1:-1][2::5, 2::5]
    rows, cols = np.mgrid[:64, :64]
    assert np.array_equal(is_colour(blocks, FULL_COLOUR), cols < rows)
    assert np.array_equal(is_colour(blocks, PARTIAL_COLOUR), cols == rows)
    large = (P.local(1024) | P.butterfly(unit=128) | P.global_tokens(1)).compile(1 << 20)
    assert len(large._repr_png_()) < 60_000
    heads = Image.open(BytesIO(P.per_head(*(P.local(i) for i in range(9))).compile(640)._repr_png_()))
    assert heads.height < 340 < heads.width < 1400


def test_the_notebook_shows_four_patterns_at_most_beside_each_other() -> None:
    """Each in a grey frame of one pixel, eight white ones between them."""
    for heads, panels in ((1, 1), (2, 2), (4, 4), (5, 4)):
        mask = P.per_head(*(P.local(i) for i in range(heads))).compile(64, block=16)
        image = np.asarray(Image.open(BytesIO(mask._repr_png_())).convert("RGB"))
        assert image.shape == (322, 322 * panels + 8 * (panels - 1), 3)
        for p in range(panels):
            framed = image[:, 330 * p : 330 * p + 322]
            edges = np.concatenate([framed[0], framed[-1], framed[:, 0], framed[:, -1]])
            assert (edges == edges[0, 0]).all()
            assert 100 < edges[0, 0] < 200
            assert np.array_equal(framed[1:-1, 1:-1][2::5, 2::5], picture(mask, p)[0]), "64 tokens of 5 pixels"
            assert (image[:, 330 * p + 322 : 330 * p + 330] == 255).all()


def test_the_notebook_table_has_the_figures_and_the_picture() -> None:
    mask = P.per_head(P.causal(), P.local(10), P.causal()).compile((1000, 5000), block=(64, 128), q_offset=17)
    text = mask._repr_html_()
    plain = re.sub(r"<[^>]*>", " ", text)
    partial = mask.nnz - mask.full_blocks
    for part in (
        "1,000 queries &times; 5,000 keys",
        "first query at",
        "64 &times; 128: 16 &times; 40 blocks",
        "1 &times; 3 (samples &times; heads), 2 distinct",
        f"{mask.nnz:,}: {mask.full_blocks:,} full, {partial:,} partial",
        f"{len(mask.tiles):,}",
        f"{mask.density:.3%} of blocks, {mask.token_density:.3%} of tokens",
        "per_head(causal(), local(10), causal())",
    ):
        assert part in plain, part
    assert plain.split()[:2] == ["pattern", "per_head(causal(),"], "what it is comes first"
    (uri,) = re.findall(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)"', text)
    assert b64decode(uri, validate=True) == mask._repr_png_()
    plain = P.causal().compile((1000, 5000))._repr_html_()  # one mask, its last query beside the last key
    assert "first query at" not in plain
    assert "samples &times; heads" not in plain
    samples = P.per_sample(P.causal(), P.causal()).compile(64)
    assert "2 &times; 1 (samples &times; heads), 1 distinct" in samples._repr_html_()


def test_a_hostile_expression_is_only_text() -> None:
    mask = replace(P.causal().compile(64), expression="\"><script>alert(1)</script><img src=x onerror='a'>" + "&" * 500)
    text = mask._repr_html_()
    assert text.count("<script") == 0
    assert text.count("<img") == 1
    assert "&lt;script&gt;alert(1)" in text
    assert "&amp; ...</code>" in text
    for length, shown in ((400, "x" * 400), (401, "x" * 400 + " ...")):
        assert f"<code>{shown}</code>" in replace(mask, expression="x" * length)._repr_html_()
    assert "<code>" not in (P.causal().compile(64) | P.full().compile(64))._repr_html_(), "no expression, no row"
