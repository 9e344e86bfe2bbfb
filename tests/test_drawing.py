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
from sparseflash.patterns.drawing import DPI, figure, heading, tick_step
from sparseflash.patterns.pixels import (
    EMPTY_COLOUR,
    FULL_COLOUR,
    LEAST_INK,
    MASKED_COLOUR,
    PARTIAL_COLOUR,
    block_counts,
    block_pixels,
    checked_window,
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
    """Coloured where allowed and only there; FULL and PARTIAL as the letters say; masked pairs only in PARTIAL."""
    mask = shape.compile(pattern)
    window = q, k = data.draw(windows(shape.q_len)), data.draw(windows(shape.kv_len))
    chosen = data.draw(st.integers(0, mask.patterns - 1))
    pixels, covered = picture(mask, chosen, window)
    assert covered == window
    dense = mask.to_dense().reshape(-1, *mask.shape)[int(np.flatnonzero(mask.pattern_of.ravel() == chosen)[0])]
    letters = mask.to_scipy(chosen).toarray().repeat(mask.block[0], 0).repeat(mask.block[1], 1)
    inside = np.s_[slice(*q), slice(*k)]
    dense, letters = dense[inside], letters[inside]
    full, partial, masked, empty = (
        is_colour(pixels, c) for c in (FULL_COLOUR, PARTIAL_COLOUR, MASKED_COLOUR, EMPTY_COLOUR)
    )
    assert np.array_equal(full | partial, dense)
    assert np.array_equal(full, letters == 1)
    assert np.array_equal(partial | masked, letters > 1)
    assert np.array_equal(empty, letters == 0)


@given(expressions() | per_head(2), shapes(600), st.data())
def test_block_pixels_count_what_they_hold(pattern: Pattern, shape: Shape, data: st.DataObject) -> None:
    mask = shape.compile(pattern)
    rows, cols = (data.draw(windows(n)) for n in mask.grid_shape)
    size = data.draw(st.integers(1, rows[1] - rows[0])), data.draw(st.integers(1, cols[1] - cols[0]))
    chosen = data.draw(st.integers(0, mask.patterns - 1))
    counts = block_counts(mask, chosen, rows, cols, size)
    letters = mask.to_scipy(chosen).toarray()[slice(*rows), slice(*cols)]
    line, column = (np.arange(n) * m // n for n, m in zip(letters.shape, size, strict=True))
    for count, here in zip(counts, (letters == 1, letters > 1), strict=True):
        expected = np.zeros(size, int)
        np.add.at(expected, (line[:, None], column[None, :]), here)
        assert np.array_equal(count, expected)
    if size == letters.shape:
        pixels = block_pixels(mask, chosen, rows, cols, size)
        assert np.array_equal(is_colour(pixels, FULL_COLOUR), letters == 1)
        assert np.array_equal(is_colour(pixels, PARTIAL_COLOUR), letters > 1)
        assert np.array_equal(is_colour(pixels, EMPTY_COLOUR), letters == 0)


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


def test_the_heading_says_how_many_blocks_a_pixel_holds() -> None:
    mask = P.causal().compile((8192, 16384), block=16)
    lines = heading(mask, None, ((0, 8192), (0, 16384)), 1, (256, 256), 1400)
    assert lines[-1] == "a pixel holds 2 x 4 blocks: the paler, the fewer of them are stored"
    part = heading(mask, None, ((0, 4096), (4096, 8192)), 1, (256, 256), 1400)
    assert part[-1] == "queries 0 to 4,095, keys 4,096 to 8,191"


def test_ticks_are_powers_of_two_with_room_for_their_labels() -> None:
    assert tick_step(1 << 20, 1024) == 1 << 17
    assert tick_step(300, 900) == 64
    assert tick_step(1, 1024) == 1
    assert tick_step(2, 120) == 1
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
    (uri,) = re.findall(r'src="data:image/png;base64,([A-Za-z0-9+/=]+)"', text)
    assert b64decode(uri, validate=True) == mask._repr_png_()


def test_a_hostile_expression_is_only_text() -> None:
    mask = replace(P.causal().compile(64), expression="\"><script>alert(1)</script><img src=x onerror='a'>" + "&" * 500)
    text = mask._repr_html_()
    assert text.count("<script") == 0
    assert text.count("<img") == 1
    assert "&lt;script&gt;alert(1)" in text
    assert "&amp; ...</code>" in text
    assert "<code>" not in (P.causal().compile(64) | P.full().compile(64))._repr_html_(), "no expression, no row"
