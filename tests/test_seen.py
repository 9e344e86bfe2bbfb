"""Pictures of what one token sees: every place of the image shows the pair that the mask has there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparseflash import patterns as P
from sparseflash.patterns import Pattern
from sparseflash.patterns.ordering import token_order
from sparseflash.patterns.placed_image import PlacedImage
from sparseflash.pictures.pixels import FULL_COLOUR, PARTIAL_COLOUR
from sparseflash.pictures.seen import BLIND_COLOUR, images_in, panel_pixels, panels_of, seen_by

IMAGES: list[Pattern] = [
    P.neighborhood((7, 9), 2),
    P.neighborhood((8, 8), 1, "morton") - P.axial((8, 8), "morton"),
    P.axial((16, 16), "hilbert") & P.causal(),
]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Pattern, int]:
    """An image with other tokens beside it, or several in a row with padding, and how many tokens that is."""
    parts = [
        P.beside(draw(st.sampled_from(IMAGES)), *draw(st.tuples(st.integers(0, 20), st.integers(0, 20))))
        for _ in range(draw(st.integers(1, 3)))
    ]
    row = P.packed(*parts)
    return row, (row.known_size or 0) + draw(st.integers(0, 30))


@given(rows(), st.data())
def test_every_key_has_one_place_and_the_colour_of_its_pair(case: tuple[Pattern, int], data: st.DataObject) -> None:
    pattern, tokens = case
    token = data.draw(st.integers(0, tokens - 1))
    mask = pattern.compile(tokens, block=16)
    panels, seen = panels_of(mask, token), seen_by(mask, 0, token)
    np.testing.assert_array_equal(seen, mask.to_dense()[token])
    places = np.concatenate([panel.tokens.ravel() for panel in panels])
    assert sorted(places[places >= 0].tolist()) == list(range(tokens))
    for panel in panels:
        pixels = panel_pixels(panel, seen, token)
        for place, key in np.ndenumerate(panel.tokens):
            blue, own = tuple(pixels[place]) == FULL_COLOUR, key == token
            assert blue == (key >= 0 and seen[key] and not own)
            assert not own or tuple(pixels[place]) == (PARTIAL_COLOUR if seen[key] else BLIND_COLOUR)


def test_a_place_of_the_panel_is_the_place_in_the_image() -> None:
    image = P.neighborhood((8, 16), (1, 2), "morton")
    mask = P.beside(image, before=5).compile(133, block=16)
    _, positions = token_order((8, 16), "morton")
    token = 5 + int(positions.reshape(8, 16)[3, 7])
    (panel, text) = panels_of(mask, token)
    want = np.zeros((8, 16), bool)
    want[2:5, 5:10] = True
    np.testing.assert_array_equal(seen_by(mask, 0, token)[panel.tokens], want)
    assert text.label == "5 beside"


def test_images_are_found_where_they_stand() -> None:
    pattern = P.packed(P.documents([4]), P.beside(IMAGES[0], 3, 2), P.beside(P.beside(IMAGES[1], 1), 2) & P.causal())
    want = (PlacedImage(7, (7, 9), "raster"), PlacedImage(75, (8, 8), "morton"))
    assert images_in(pattern.compile(200)) == want
    assert images_in(pattern.compile(100)) == ()
    for none in (P.causal(), P.where(lambda q, k: q == k), P.axial((8, 8)) & P.axial((8, 8), "morton")):
        assert images_in(none.compile(64)) == ()
    assert images_in(P.axial((8, 8)).compile(64) & P.causal().compile(64)) == (), "no pattern, no image"


def test_a_video_is_drawn_frame_by_frame() -> None:
    video = (30, 4, 5)
    # The frame of a query, and its place in every other one.
    pattern = P.neighborhood(video, (0, 4, 5)) | P.neighborhood(video, (30, 0, 0))
    mask = P.beside(pattern, before=7).compile(607, block=16)
    token = 7 + 20 * 12 + 8  # place (1, 3) of frame 12
    panels, seen = panels_of(mask, token), seen_by(mask, 0, token)
    assert [panel.label for panel in panels] == [*(f"frame {n} of 30" for n in range(24)), "7 beside"]
    for number, panel in enumerate(panels[:24]):
        want = np.zeros((4, 5), bool)
        want[1, 3] = True
        np.testing.assert_array_equal(seen[panel.tokens], want | (number == 12))
    assert [panels_of(mask, 606)[n].label for n in (0, 23, 24)] == ["frame 6 of 30", "frame 29 of 30", "7 beside"]
    first = panels_of(mask, 0)
    assert [first[0].label, first[23].label] == ["frame 0 of 30", "frame 23 of 30"]


def blue(path: Path) -> int:
    return int((np.asarray(Image.open(path).convert("RGB")) == FULL_COLOUR).all(axis=2).sum())


def test_the_picture_shows_every_place_in_equally_many_pixels(tmp_path: Path) -> None:
    mask = P.beside(P.neighborhood((20, 30), 3), before=40).compile(640, block=16)
    mask.plot(tmp_path / "seen.png", title="a title", token=40 + 10 * 30 + 15)
    times = 220 // 30
    seen_others = 7 * 7 - 1 + 40
    legend = blue(tmp_path / "seen.png") - seen_others * times**2
    assert 0 < legend < 2000, "what is left is the swatch of the legend"
    mask.plot(tmp_path / "text.png", token=0)
    assert blue(tmp_path / "text.png") - legend == (640 - 1) * times**2
    heads = P.per_head(P.neighborhood((20, 30), 3), P.full()).compile(600, block=16)
    heads.plot(tmp_path / "heads.png", token=315)
    assert blue(tmp_path / "heads.png") - legend == (48 + 599) * times**2


@pytest.mark.parametrize(
    ("pattern", "given", "kind", "message"),
    [
        (P.axial((8, 8)), {"token": 64}, ValueError, "token must be 0 to 63, the mask's queries; got token=64"),
        (P.axial((8, 8)), {"token": 1.5}, TypeError, "token must be an int, got token=1.5"),
        (P.causal(), {"token": 3}, ValueError, r"causal\(\) has none. .*: window=\(\(3, 4\), \(0, 64\)\)"),
        (P.axial((8, 8)), {"token": 3, "window": ((0, 3), (0, 3))}, ValueError, "give window= or token="),
    ],
)
def test_refusals(
    pattern: Pattern, given: dict[str, object], kind: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        pattern.compile(64).plot(tmp_path / "m.png", **given)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
