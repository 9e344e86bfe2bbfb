"""The page to zoom into: what is in the file."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given

from sparseflash import patterns as P
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.patterns.grid import Grid
from sparseflash.patterns.runs import Runs
from sparseflash.pictures import viewer
from tests.strategies import Shape, expressions, per_head, per_sample, shapes

HOSTILE = "</script><script>document.title='stolen'</script><!-- &amp; \"' @@DATA@@ \u2028 \ud800"


class Parts(HTMLParser):
    """Elements, attributes and text of a page, as a browser would see them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text: dict[str, list[str]] = {}
        self.open: list[str] = []
        self.language = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        if tag not in ("meta", "link", "input"):
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]
        self.language = dict(attrs).get("lang") or self.language

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)


def data_of(page: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Parts(page).text["script"][0])
    return found


def decoded(page: str) -> BlockMask:
    """The mask back from the page, read as its module documents the arrays."""
    data = data_of(page)

    def words(name: str, dtype: str = "<i4") -> np.ndarray:
        return np.frombuffer(zlib.decompress(base64.b64decode(data["arrays"][name])), dtype)

    (q_len, kv_len), (bq, bk) = data["shape"], data["block"]
    grid = Grid(q_len, kv_len, bq, bk, data["q_offset"])
    starts, stops, gaps, lengths = [], [], words("gap"), words("length")
    run = 0
    assert len(words("counts")) == grid.rows * len(data["patterns"])
    for row, count in enumerate(words("counts")):
        at = row * grid.cols
        for _ in range(count):
            starts.append(at + int(gaps[run]))
            at = starts[-1] + int(lengths[run])
            stops.append(at)
            run += 1
    rows = grid.rows * len(data["patterns"])
    codes = words("code").astype(np.int32)
    runs = Runs((rows, grid.cols), np.array(starts, np.int64), np.array(stops, np.int64), codes)
    tiles = words("tiles", "<u4").reshape(data["tiles"], bq, -(-bk // 32)).astype(np.uint32)
    return BlockMask(grid, runs, tiles, words("pattern_of").reshape(data["heads"]).astype(np.int32))


@given(expressions() | per_head(2) | per_sample(), shapes(300))
def test_the_page_holds_exactly_the_mask(pattern: Pattern, shape: Shape) -> None:
    mask = shape.compile(pattern)
    text = viewer.page(mask, "a pattern")
    assert decoded(text) == mask
    data = data_of(text)
    assert data["density"] == mask.density
    of_pattern = [data["patterns"][p] for p in mask.pattern_of.flat]
    assert sum(one["blocks"] for one in of_pattern) == mask.nnz
    assert sum(one["full_blocks"] for one in of_pattern) == mask.full_blocks
    assert np.mean([one["density"] for one in of_pattern]) == pytest.approx(mask.density, rel=1e-12)
    token_density = np.mean([one["token_density"] for one in of_pattern])
    assert token_density == pytest.approx(mask.token_density, rel=1e-12)


def test_block_rows_of_nothing_are_counted_too() -> None:
    """The last ones as well: the browser reads a count for each."""
    blocks = np.zeros((6, 3), bool)
    blocks[1, 1] = True
    mask = P.from_blocks(blocks, unit=16).compile((96, 48), block=16, q_offset=0)
    assert decoded(viewer.page(mask)) == mask


def test_the_page_needs_nothing_from_outside() -> None:
    text = viewer.page(P.causal().compile(300), "causal()")
    parts = Parts(text)
    assert parts.addresses == ["data:,"], "only the empty icon"
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bimport\b|fetch|XMLHttpRequest|WebSocket", text)
    assert "default-src 'none'" in text
    assert parts.language == "en"
    assert parts.text["title"] == ["causal() - block mask"]
    assert not parts.open, "every element is closed"


def test_a_title_stays_text(tmp_path: Path) -> None:
    P.causal().compile(300).write_html(tmp_path / "m.html", title=HOSTILE)
    text = (tmp_path / "m.html").read_text(encoding="utf-8")
    parts = Parts(text)
    assert parts.elements.count("script") == 2
    assert parts.text["h1"] == [HOSTILE.replace("\ud800", "?")]
    assert decoded(text) == P.causal().compile(300)


def test_a_long_title_is_whole_in_the_heading_only() -> None:
    title = f"documents({list(range(1, 400))})"
    parts = Parts(viewer.page(P.full().compile(16, block=16), title))
    assert parts.text["h1"] == [title]
    for length in (120, 121):
        title = "word " * ((length - 4) // 5) + "x" * (length - 5 * ((length - 4) // 5))
        shown = Parts(viewer.page(P.full().compile(16, block=16), title)).text["title"][0]
        assert shown == (title if length == 120 else "word " * 23 + "...") + " - block mask"


def test_the_heading_is_the_title_or_the_expression() -> None:
    mask = P.local(5).compile(16, block=16)
    assert Parts(viewer.page(mask)).text["h1"] == ["local(5)"]
    named = viewer.page(mask, "near")
    assert Parts(named).text["h1"] == ["near"]
    assert data_of(named)["expression"] == "local(5)"
    assert Parts(viewer.page(mask | mask)).text["h1"] == ["Block mask"]


def test_a_million_tokens_take_little(tmp_path: Path) -> None:
    mask = (P.causal() & (P.local(1024) | P.butterfly(unit=128))).compile(1 << 20)
    mask.write_html(tmp_path / "m.html")
    assert (tmp_path / "m.html").stat().st_size < 200_000


def test_masks_too_large_for_a_page_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = P.random_blocks(4, unit=16).compile(4096, block=16)
    monkeypatch.setattr(viewer, "MAX_UNPACKED", 1000)
    with pytest.raises(ValueError, match=r"too large for a page: .* runs and 0 tiles.*larger blocks"):
        mask.write_html(tmp_path / "m.html")
    monkeypatch.undo()
    monkeypatch.setattr(viewer, "MAX_PAGE", 1000)
    with pytest.raises(ValueError, match="at most 1,000 are written"):
        mask.write_html(tmp_path / "m.html")
    assert not list(tmp_path.iterdir())


def test_a_page_holds_as_much_as_its_limits_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs and tiles as they are unpacked, 32-bit words each; and the whole text."""
    mask = P.per_head(P.causal() & P.strided(7), P.local(50)).compile((300, 500), block=(16, 64))
    text = viewer.page(mask)
    arrays = data_of(text)["arrays"]
    held = sum(
        len(zlib.decompress(base64.b64decode(arrays[name]))) for name in ("counts", "gap", "length", "code", "tiles")
    )
    for limit, needed in (("MAX_UNPACKED", held), ("MAX_PAGE", len(text))):
        monkeypatch.setattr(viewer, limit, needed)
        assert viewer.page(mask) == text
        monkeypatch.setattr(viewer, limit, needed - 1)
        with pytest.raises(ValueError, match=f" {needed:,} bytes"):
            viewer.page(mask)
        monkeypatch.undo()


def test_a_line_has_as_many_blocks_as_a_word_can_count() -> None:
    """The browser reads lengths of runs as signed 32-bit words."""
    for blocks in ((1 << 31) - 1, 1 << 31):
        mask = P.full().compile((16, 16 * blocks), block=16)
        if blocks < 1 << 31:
            assert decoded(viewer.page(mask)) == mask
        else:
            with pytest.raises(ValueError, match="too large for a page"):
                viewer.page(mask)


def test_a_page_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.html"
    with pytest.raises(FileNotFoundError, match="no folder"):
        P.causal().compile(300).write_html(tmp_path / "nowhere" / "m.html")
    path.write_text("old")

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="disk full"):
        P.causal().compile(300).write_html(path)
    monkeypatch.undo()
    assert path.read_text() == "old"
    P.causal().compile(300).write_html(path)
    assert decoded(path.read_text()) == P.causal().compile(300)
    assert [p.name for p in tmp_path.iterdir()] == ["m.html"], "a temporary file is left"


def test_users_of_a_pattern() -> None:
    named = [
        (P.per_head(P.causal(), P.local(3), P.causal(), P.causal()), ["heads 0, 2-3", "heads 1"]),
        (P.per_sample(P.causal(), P.local(3)), ["samples 0", "samples 1"]),
        (
            P.per_sample(P.per_head(P.causal(), P.local(3)), P.causal()),
            ["sample 0: heads 0; sample 1: heads 0-1", "sample 0: heads 1"],
        ),
        (P.causal(), ["all heads"]),
    ]
    for pattern, names in named:
        assert [one["name"] for one in viewer.content_of(pattern.compile(64, block=16), "")["patterns"]] == names


def test_users_of_a_pattern_are_named_until_they_are_too_many() -> None:
    """Eight ranges of heads, four samples."""
    odd = np.arange(18, dtype=np.int32)[None] % 2
    assert viewer.users(odd[:, :16], 1) == "heads 1, 3, 5, 7, 9, 11, 13, 15"
    assert viewer.users(odd, 1) == "heads 1, 3, 5, 7, 9, 11, 13, 15, ..."
    assert viewer.users(odd.T, 0).startswith("samples 0, 2, 4, 6, 8, 10, 12, 14, ...")
    four = "sample 1: heads 0; sample 2: heads 0; sample 3: heads 0; sample 4: heads 0"
    for more, rest in ((0, ""), (1, "; and 1 more samples"), (3, "; and 3 more samples")):
        pattern_of = np.array([[1, 1], *[[0, 1]] * (4 + more)], np.int32)
        assert viewer.users(pattern_of, 0) == four + rest
