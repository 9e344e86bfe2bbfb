"""The page to zoom into, as a person meets it in a browser."""

from __future__ import annotations

import base64
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseflash import patterns as P
from sparseflash.patterns import BlockMask, Pattern
from sparseflash.pictures import viewer
from sparseflash.pictures.pixels import FULL_COLOUR, MASKED_COLOUR, PARTIAL_COLOUR
from sparseflash.pictures.seen import BLIND_COLOUR, UNSEEN_COLOUR, images_in
from tests.test_viewer import HOSTILE, data_of

Open = Callable[..., "Page"]


class Page:
    """A page in the browser: what a person does and sees."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.run("const done = arguments[0]; mask.ready.then(() => done(), error => done(String(error)))", wait=True)
        self.settle()

    def run(self, script: str, *arguments: Any, wait: bool = False) -> Any:
        return (self.driver.execute_async_script if wait else self.driver.execute_script)(script, *arguments)

    def settle(self) -> None:
        """Wait until what was asked for is drawn."""
        self.run("const done = arguments[0]; requestAnimationFrame(() => requestAnimationFrame(done))", wait=True)

    def find(self, name: str) -> Any:
        return self.driver.find_element("id", name)

    def click(self, name: str) -> None:
        self.find(name).click()
        self.settle()

    def view(self) -> dict[str, Any]:
        found: dict[str, Any] = self.run("return mask.view()")
        return found

    def go_to(self, q: int, k: int, across: int) -> None:
        self.run("mask.goTo(...arguments)", q, k, across)
        self.settle()

    def at(self, pairs: list[tuple[int, int]]) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.run("return arguments[0].map(pair => mask.at(...pair))", pairs)
        return found

    def pixels(self, pairs: Sequence[tuple[int, float]]) -> np.ndarray:
        """What is drawn around the middle of each pair: uint8 [pairs, 3, 3, RGB], the middle pixel and its neighbours.

        Read from a copy of the canvas, since the browser warns of canvases that are often read.
        """
        found = self.run(
            """const canvas = document.getElementById("plot"), copy = new OffscreenCanvas(canvas.width, canvas.height);
            const box = canvas.getBoundingClientRect(), scale = canvas.width / box.width;
            const pixels = copy.getContext("2d", { willReadFrequently: true });
            pixels.drawImage(canvas, 0, 0);
            return arguments[0].map(pair => {
              const [x, y] = mask.toClient(...pair), left = Math.floor((x - box.left) * scale);
              return [...pixels.getImageData(left - 1, Math.floor((y - box.top) * scale) - 1, 3, 3).data];
            })""",
            pairs,
        )
        return np.array(found, np.uint8).reshape(len(pairs), 3, 3, 4)[..., :3]

    def pixel(self, q: int, k: int) -> tuple[int, ...]:
        return tuple(self.pixels([(q, k)])[0, 1, 1].tolist())

    def darkest(self, q: int, k: float) -> int:
        """The least sum of red, green and blue beside a place."""
        return int(self.pixels([(q, k)])[0].sum(axis=-1, dtype=int).min())

    def pointer(self, q: int, k: int) -> Any:
        """A chain of actions that begins with the pointer over a pair."""
        from selenium.webdriver import ActionChains

        x, y = self.run("return mask.toClient(...arguments).map(Math.floor)", q, k)
        chain: Any = ActionChains(self.driver, duration=50)
        chain.w3c_actions.pointer_action.move_to_location(x, y)
        return chain

    def hover(self, q: int, k: int) -> str:
        self.pointer(q, k).perform()
        self.settle()
        return self.tooltip()

    def tooltip(self) -> str:
        text: str = self.find("tooltip").text
        return text

    def wheel(self, q: int, k: int, amount: int) -> None:
        from selenium.webdriver.common.actions.wheel_input import ScrollOrigin

        canvas = self.find("plot")
        x, y = self.run("return mask.toClient(...arguments)", q, k)
        box = canvas.rect
        origin = ScrollOrigin.from_element(
            canvas, int(x - box["x"] - box["width"] / 2), int(y - box["y"] - box["height"] / 2)
        )
        self.pointer(q, k).scroll_from_origin(origin, 0, amount).perform()
        self.settle()

    def keys(self, *keys: str) -> None:
        self.find("plot").send_keys(*keys)
        self.settle()


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        missing = "chromium" if chromium is None else "chromedriver"
        pytest.skip(f"no {missing} on this machine: the page is not tried in a browser")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = chromium
    flags = "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,800"
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # With the driver's path given, selenium looks for no other and downloads nothing.
    browser = Chrome(options=options, service=Service(chromedriver))
    try:
        yield browser
    finally:
        browser.quit()


@pytest.fixture
def show(driver: Any, tmp_path: Path) -> Iterator[Open]:
    """Write the page of a mask and open it; afterwards the console must be silent."""

    def opened(mask: BlockMask, title: str | None = None) -> Page:
        mask.write_html(tmp_path / "m.html", title=title)
        driver.get((tmp_path / "m.html").as_uri())
        return Page(driver)

    yield opened
    assert driver.get_log("browser") == []


def test_colours_say_what_is_stored(show: Open) -> None:
    page = show(P.causal().compile(2048), "causal()")
    assert page.driver.title == "causal() - block mask"
    assert page.find("plot").get_attribute("data-state") == "ready"
    assert page.view()["queries"] == page.view()["keys"] == [0, 2047]
    assert page.pixel(1500, 300) == FULL_COLOUR
    assert page.pixel(448, 448) == PARTIAL_COLOUR
    assert page.pixel(300, 1500) == (255, 255, 255)
    for across in (60, 400):
        page.go_to(448, 448, across)
        assert page.pixel(450, 446) == PARTIAL_COLOUR, "an allowed pair of a PARTIAL block"
        assert page.pixel(446, 450) == MASKED_COLOUR, "a pair that it does not allow"
    # Grid lines are drawn over the cells: dark at block borders, faint between tokens.
    page.go_to(512, 511, 40)
    border, between, inside = (page.darkest(520, key) for key in (511.5, 505.5, 505))
    assert border < between < inside == sum(FULL_COLOUR)


def test_single_blocks_do_not_fade_out(show: Open) -> None:
    blocks = np.zeros((8192, 8192), bool)
    lone = [(170, 4001), (5000, 123), (8191, 8191)]
    blocks[tuple(np.transpose(lone))] = True
    page = show(P.from_blocks(blocks, unit=16).compile(8192 * 16, block=16))
    inked = page.run(
        """const canvas = document.getElementById("plot"), copy = new OffscreenCanvas(canvas.width, canvas.height);
        const pixels = copy.getContext("2d", { willReadFrequently: true });
        pixels.drawImage(canvas, 0, 0);
        const { data } = pixels.getImageData(80, 30, canvas.width - 90, canvas.height - 34);
        return data.filter((red, i) => i % 4 === 0 && data[i + 2] - red > 60).length"""
    )
    assert 3 <= inked <= 3 * 4, "each lone block is a cell of one to two pixels a side"
    for row, col in lone[:2]:
        # From a block being a tenth of a pixel down to its tokens. Far away it may stand a pixel beside its place.
        for across in (131072, 20000, 3000, 200, 30):
            page.go_to(row * 16 + 8, col * 16 + 8, across)
            around = page.pixels([(row * 16 + 8, col * 16 + 8)])[0].astype(int)
            assert (around[..., 2] - around[..., 0]).max() > 60, across


def test_buttons_wheel_keys_and_double_click_zoom(show: Open) -> None:
    page = show(P.causal().compile(4096))
    whole = page.view()
    page.click("zoom-in")
    closer = page.view()
    assert closer["pixelsPerToken"][0] == pytest.approx(2 * whole["pixelsPerToken"][0])
    page.click("zoom-out")
    assert page.view()["pixelsPerToken"] == pytest.approx(whole["pixelsPerToken"])
    page.keys("+", "+")
    assert page.view()["pixelsPerToken"][0] == pytest.approx(2.25 * whole["pixelsPerToken"][0])
    page.keys("-")
    page.keys("0")
    assert page.view() == whole
    page.pointer(1000, 2000).double_click().perform()
    page.settle()
    assert page.view()["pixelsPerToken"][0] == pytest.approx(3 * whole["pixelsPerToken"][0])
    page.click("fit")
    assert page.view() == whole
    for _ in range(12):
        page.wheel(2000, 1000, -400)
    deep = page.view()
    assert deep["pixelsPerToken"] == [64, 64], "down to single tokens"
    # The pair under the pointer stays there: one pixel of the whole mask is five tokens.
    for span, position in ((deep["queries"], 2000), (deep["keys"], 1000)):
        assert span[0] - 6 <= position <= span[1] + 6
        assert span[1] - span[0] < 30


def test_the_tooltip_tells_about_the_pair_under_the_pointer(show: Open) -> None:
    mask = (P.causal() & (P.local(40) | P.butterfly(unit=16))).compile((1000, 1500), block=(128, 64))
    page = show(mask)
    dense = mask.to_dense()
    page.go_to(777, 700, 50)
    for q, k in ((777, 705), (778, 690), (770, 712)):
        text = page.hover(q, k)
        i = q - mask.q_offset
        row, col = i // 128, k // 64
        inside = dense[row * 128 : row * 128 + 128, col * 64 : col * 64 + 64]
        code = mask.to_scipy()[row, col]
        name = "EMPTY" if code == 0 else "FULL" if code == 1 else f"PARTIAL, tile {code - 2}"
        assert text.splitlines()[:2] == [
            f"query {q}, key {k}: {'allowed' if dense[i, k] else 'not allowed'}",
            f"block ({row}, {col}): {name}",
        ]
        assert f"{inside.sum():,} of {inside.size:,} pairs" in text
    page.pointer(777, 705).move_to_element(page.find("fit")).perform()
    page.settle()
    assert not page.find("tooltip").is_displayed()


def test_dragging_and_arrow_keys_pan(show: Open) -> None:
    page = show(P.local(300).compile(8192))
    page.go_to(4000, 4000, 1000)
    x, y = page.run("return mask.toClient(4000, 4000)")
    page.pointer(4000, 4000).click_and_hold().move_by_offset(-120, 60).release().perform()
    page.settle()
    assert page.run("return mask.toClient(4000, 4000)") == pytest.approx([x - 120, y + 60], abs=1.0)
    before = page.view()
    page.keys("\ue014", "\ue014")  # right
    assert page.view()["keys"][0] - before["keys"][0] == pytest.approx(200, abs=2)
    assert page.view()["queries"] == before["queries"]
    middle = sum(page.view()["keys"]) / 2
    key = int(page.tooltip().split(", key ")[1].split(":")[0].replace(",", ""))
    assert key == pytest.approx(middle, abs=1), "the keyboard reads out the pair at the centre"
    page.keys("\ue015")  # down
    assert page.view()["queries"][0] > before["queries"][0]
    page.keys(*["\ue012"] * 50)  # left, past the edge
    assert page.view()["keys"][0] == 0


def test_two_fingers_zoom(show: Open) -> None:
    page = show(P.causal().compile(4096))
    before = page.view()["pixelsPerToken"][0]
    x, y = page.run("return mask.toClient(2000, 2000)")
    page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True, "maxTouchPoints": 2})
    try:
        for kind, apart in (("touchStart", 50), ("touchMove", 75), ("touchMove", 100), ("touchEnd", None)):
            points = [] if apart is None else [{"x": x + s * apart, "y": y, "id": n} for n, s in enumerate((-1, 1))]
            page.driver.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    finally:
        page.driver.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})
    page.settle()
    assert page.view()["pixelsPerToken"][0] == pytest.approx(2 * before, rel=0.01)
    assert page.run("return mask.toClient(2000, 2000)") == pytest.approx([x, y], abs=2)


def test_go_to_centres_a_pair(show: Open) -> None:
    page = show(P.causal().compile((500, 70_000)))
    for name, value in (("go-q", "69750"), ("go-k", "69600")):
        page.find(name).clear()
        page.find(name).send_keys(value)
    page.find("go").submit()
    page.settle()
    seen = page.view()
    assert sum(seen["queries"]) / 2 == pytest.approx(69750, abs=1)
    assert sum(seen["keys"]) / 2 == pytest.approx(69600, abs=1)
    assert min(seen["pixelsPerToken"]) >= 8
    found = page.run("return document.getElementById('range').textContent")
    assert f"queries {seen['queries'][0]:,} to {seen['queries'][1]:,}, keys" in found


def test_each_pattern_can_be_chosen(show: Open) -> None:
    mask = P.per_head(P.causal(), P.local(64), P.causal()).compile(1024)
    page = show(mask, "two patterns")
    assert "per_head(causal(), local(64), causal())" in page.find("figures").text
    assert page.pixel(900, 100) == FULL_COLOUR
    menu = page.find("pattern")
    assert [one.text for one in menu.find_elements("tag name", "option")] == ["0: heads 0, 2", "1: heads 1"]
    assert "36 blocks" in page.find("figures").text
    menu.find_elements("tag name", "option")[1].click()
    page.settle()
    assert page.view()["pattern"] == 1
    assert page.pixel(900, 100) == (255, 255, 255)
    assert "22 blocks: 0 full, 22 partial" in page.find("figures").text
    assert page.at([(900, 100)]) == [
        {
            "block": [7, 0],
            "code": "EMPTY",
            "tile": None,
            "density": 0,
            "allowed": False,
            "allowedPairs": 0,
            "pairs": 16384,
        }
    ]


@pytest.mark.parametrize(
    ("pattern", "lengths", "block", "offset"),
    [
        (P.causal() & (P.local(40) | P.butterfly(unit=16)), (1000, 1000), (128, 128), None),
        (P.log_sparse() | P.global_tokens(3), (333, 777), (64, 16), None),
        (P.dilated(9, 7) | P.random_blocks(2, unit=32), (513, 300), (16, 256), 40),
        (P.per_head(P.star(), P.where(lambda q, k: (q * k) % 7 == 1)), (200, 260), (32, 32), -20),
    ],
    ids=["square", "more-keys", "offset", "per-head"],
)
def test_every_pair_is_told_as_it_is(
    show: Open, pattern: Pattern, lengths: tuple[int, int], block: tuple[int, int], offset: int | None
) -> None:
    mask = pattern.compile(lengths, block=block, q_offset=offset)
    page = show(mask)
    dense = mask.to_dense().reshape(-1, *lengths)
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, lengths[0], 2000), rng.integers(0, lengths[1], 2000)
    for head, p in enumerate(mask.pattern_of[0]):
        page.run("mask.select(arguments[0])", int(p))
        told = page.at([(int(q) + mask.q_offset, int(k)) for q, k in zip(i, j, strict=True)])
        assert np.array_equal([pair["allowed"] for pair in told], dense[head, i, j])
        codes = mask.to_scipy(int(p)).toarray()[i // block[0], j // block[1]]
        names = np.array(["EMPTY", "FULL", "PARTIAL"])[np.minimum(codes, 2)]
        assert [pair["code"] for pair in told] == names.tolist()
        for pair, code in zip(told[:200], codes[:200], strict=True):
            (row, col), (bq, bk) = pair["block"], block
            inside = dense[head, row * bq : (row + 1) * bq, col * bk : (col + 1) * bk]
            assert pair["density"] == inside.mean()
            assert pair["tile"] == (code - 2 if code >= 2 else None)
    first = mask.q_offset
    outside = [(first - 1, 0), (first + lengths[0], 0), (first, -1), (first, lengths[1])]
    assert page.at(outside) == [None] * 4


def test_drawn_tokens_are_the_mask(show: Open) -> None:
    """Pixel by pixel close up, at a zoom that is not a whole number of pixels per token."""
    mask = (P.local(9) | P.dilated(5, 13)).compile(200, block=32)
    page = show(mask)
    page.go_to(100, 110, 45)
    seen = page.view()
    q0, q1 = seen["queries"][0] + 1, seen["queries"][1] - 1
    k0, k1 = seen["keys"][0] + 1, seen["keys"][1] - 1
    pairs = [(q, k) for q in range(q0, q1 + 1) for k in range(k0, k1 + 1)]
    drawn = page.pixels(pairs)[:, 1, 1].reshape(q1 - q0 + 1, k1 - k0 + 1, 3)
    allowed = (drawn == PARTIAL_COLOUR).all(axis=-1) | (drawn == FULL_COLOUR).all(axis=-1)
    assert allowed.size > 500
    assert np.array_equal(allowed, mask.to_dense()[q0 : q1 + 1, k0 : k1 + 1])


def test_a_hostile_title_is_shown_as_text(show: Open) -> None:
    page = show(P.causal().compile(100), HOSTILE)
    assert page.driver.title.startswith("</script><script>")
    assert page.find("plot").get_attribute("data-state") == "ready"
    heading = page.driver.find_element("tag name", "h1").get_attribute("textContent")
    assert heading == HOSTILE.replace("\ud800", "?")


def test_damaged_data_is_said(driver: Any, tmp_path: Path) -> None:
    text = viewer.page(P.causal().compile(1000))
    length = data_of(text)["arrays"]["length"]
    other = base64.b64encode(zlib.compress(np.ones(3, "<i4").tobytes())).decode()
    (tmp_path / "m.html").write_text(text.replace(length, other))
    driver.get((tmp_path / "m.html").as_uri())
    driver.execute_async_script("const done = arguments[0]; mask.ready.catch(() => {}).finally(done)")
    problem = driver.find_element("id", "problem")
    assert problem.is_displayed()
    assert problem.text == "The mask cannot be shown: the data of this page is damaged"
    driver.get_log("browser")


def test_a_million_tokens_pan_in_time(show: Open) -> None:
    """The view answers at least ten times a second; ten times that is usual, and this machine may be busy."""
    page = show((P.causal() & (P.local(1024) | P.butterfly(unit=128))).compile(1 << 20))
    times = page.run(
        """const done = arguments[0], times = [];
        let before = performance.now(), step = 0;
        function next() {
          const now = performance.now();
          times.push(now - before);
          before = now;
          if (++step > 40) return done(times);
          mask.goTo(300000 + 9000 * step, 300000, 400000);
          requestAnimationFrame(next);
        }
        requestAnimationFrame(next);""",
        wait=True,
    )
    assert len(times) == 41
    assert np.median(times) < 100


SEEN: list[tuple[Pattern, int]] = [
    (P.neighborhood((9, 14), 2), 126),
    (P.beside(P.neighborhood((8, 16), (1, 3), "morton"), before=21, after=3), 152),
    (P.packed(P.beside(P.axial((6, 10)), before=5, sees=False), P.neighborhood((7, 7), 2) & P.causal()), 130),
]


@pytest.mark.parametrize(("pattern", "tokens"), SEEN, ids=[str(pattern) for pattern, _ in SEEN])
def test_the_query_under_the_pointer_is_shown_in_its_image(show: Open, pattern: Pattern, tokens: int) -> None:
    mask = pattern.compile(tokens, block=(16, 32))
    page, images, dense = show(mask), images_in(mask), mask.to_dense()
    assert not page.find("seen-part").is_displayed()
    for query in (0, 7, tokens // 2, tokens - 1):
        image = next((one for one in images if one.start <= query < one.start + one.tokens), images[0])
        seen, places = dense[query], image.positions[0]
        inside = int(seen[places].sum())
        found = page.run("return mask.seen(arguments[0])", query)
        assert found == {"start": image.start, "inside": inside, "beside": int(seen.sum()) - inside}
        drawn = page.run(
            """const plot = document.getElementById("seen"), copy = new OffscreenCanvas(plot.width, plot.height);
            const own = copy.getContext("2d", { willReadFrequently: true });
            own.drawImage(plot, 0, 0);
            return [plot.height, plot.width, ...own.getImageData(0, 0, plot.width, plot.height).data];"""
        )
        pixels = np.array(drawn[2:], np.uint8).reshape(*drawn[:2], 4)[..., :3]
        want = np.array([UNSEEN_COLOUR, FULL_COLOUR, BLIND_COLOUR, PARTIAL_COLOUR], np.uint8)
        np.testing.assert_array_equal(pixels, want[seen[places] + 2 * (places == query)])
    assert page.run("return mask.seen(arguments[0])", tokens) is None
    page.hover(tokens // 2, 3)
    assert page.find("seen-part").is_displayed()
    assert page.find("seen-text").text.startswith(f"query {tokens // 2} sees ")


def test_a_pattern_without_an_image_shows_none(show: Open) -> None:
    page = show(P.causal().compile(64, block=16))
    page.hover(20, 3)
    assert not page.find("seen-part").is_displayed()
    assert page.run("return mask.seen(3)") is None
