"""The documentation site as a person meets it: opened from a folder, wide and narrow, light and dark.

Screenshots of some pages lie in build/screenshots afterwards, whether the tests pass or not.
"""

from __future__ import annotations

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SCREENSHOTS = ROOT / "build" / "screenshots"
WIDTHS, SCHEMES = (1400, 400), ("light", "dark")
SHOWN = (
    "index.html", "gallery.html", "tutorial.html", "benchmarks/index.html", "benchmarks/h200.html",
    "notebooks/pathfinder.html", "notebooks/tour.html", "api/patterns.html", "how-tables-work.html",
)  # fmt: skip
TALLEST = 3000  # pixels of a screenshot
for library in ("mkdocs", "material", "mkdocstrings", "selenium"):
    pytest.importorskip(library, reason=f"{library} is not installed: the site is not tried in a browser")

from tests.tooling.test_site import built  # noqa: E402

# What is wider than the window, unless something around it scrolls or hides it; and pictures that are not there.
LOOK = """
const done = arguments[0];
for (const image of document.images) image.loading = "eager";
const waited = [...document.images].map(image => image.complete ? null : new Promise(seen => {
  image.addEventListener("load", seen); image.addEventListener("error", seen); }));
Promise.all(waited).then(() => done({
  overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
  body: document.body.scrollWidth - document.body.clientWidth,
  wide: [...document.querySelectorAll("body *")].filter(one => one.getBoundingClientRect().right > innerWidth + 1)
    .slice(0, 3).map(one => one.outerHTML.slice(0, 120)),
  broken: [...document.images].filter(image => image.naturalWidth === 0).map(image => image.src),
  undescribed: [...document.querySelectorAll("article img:not([alt]), article img[alt='']")].map(image => image.src),
  links: [...document.links].map(link => link.href).filter(address => address.startsWith("file:")),
  height: document.documentElement.scrollHeight,
}));
"""


class Site:
    """The site in a browser."""

    def __init__(self, driver: Any, folder: Path) -> None:
        self.driver, self.folder = driver, folder

    @property
    def pages(self) -> list[str]:
        return sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*.html"))

    def window(self, width: int, height: int = 1000, scheme: str = "light") -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def open(self, page: str) -> dict[str, Any]:
        self.driver.get((self.folder / page).as_uri())
        return self.look()

    def look(self) -> dict[str, Any]:
        found: dict[str, Any] = self.driver.execute_async_script(LOOK)
        return found

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def screenshot(self, name: str) -> None:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        data = self.driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})["data"]
        (SCREENSHOTS / f"{name}.png").write_bytes(base64.b64decode(data))


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    chromedriver = shutil.which("chromedriver")
    if chromium is None or chromedriver is None:
        missing = "chromium" if chromium is None else "chromedriver"
        pytest.skip(f"no {missing} on this machine: the site is not tried in a browser")
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    folder = built()
    options = ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = Chrome(options=options, service=Service(chromedriver))
    browser.set_script_timeout(60)
    # The theme remembers the scheme that it began with.
    forget = {"source": "localStorage.clear()"}
    browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", forget)
    try:
        yield Site(browser, folder)
    finally:
        browser.quit()


def test_every_page_fits_and_finds_its_pictures_and_links(site: Site) -> None:
    wrong = []
    for page in site.pages:
        if page == "404.html":  # its addresses begin with a slash, for servers
            continue
        site.window(WIDTHS[0])
        seen = site.open(page)
        for width in WIDTHS:
            site.window(width)
            fits = site.look()
            if max(fits["overflow"], fits["body"]) > 0:
                wrong.append(f"{page} is {fits['overflow']} pixels too wide in {width}: {fits['wide']}")
        wrong += [f"{page} shows no {picture}" for picture in seen["broken"]]
        wrong += [f"{page} does not describe {picture}" for picture in seen["undescribed"]]
        files = {Path(link.removeprefix("file://").partition("#")[0]) for link in seen["links"]}
        wrong += [f"{page} links to {file}" for file in files if not file.exists()]
        wrong += [f"{page}: {entry['message']}" for entry in site.driver.get_log("browser")]
    assert wrong == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_pages_look_as_they_should(site: Site, width: int, scheme: str) -> None:
    for page in SHOWN:
        site.window(width, scheme=scheme)
        seen = site.open(page)
        site.window(width, min(seen["height"], TALLEST), scheme)
        site.screenshot(f"{page.removesuffix('.html').replace('/', '-')}-{width}-{scheme}")
        assert seen["overflow"] <= 0, page
        background = site.run("return getComputedStyle(document.body).backgroundColor")
        channels = [int(part) for part in background.removeprefix("rgb(").removesuffix(")").split(",")[:3]]
        assert (sum(channels) < 3 * 128) == (scheme == "dark"), f"{page}: {background}"
        other = "light" if scheme == "dark" else "dark"
        shown = site.run(
            """const pictures = document.querySelectorAll(`img[src$='#only-${arguments[0]}']`);
            return [...pictures].filter(picture => picture.offsetWidth).length""",
            other,
        )
        assert shown == 0, f"{page} shows pictures of the {other} scheme"
    assert site.driver.get_log("browser") == []


def test_the_first_column_stays_and_expressions_are_whole(site: Site) -> None:
    site.window(400)
    site.open("benchmarks/epyc.html")
    moved = site.run(
        """const wraps = [...document.querySelectorAll(".md-typeset__scrollwrap")];
        const wrap = wraps.find(one => one.scrollWidth > one.clientWidth + 100);
        wrap.scrollLeft = 60;
        const cell = wrap.querySelector("td"), before = wrap.getBoundingClientRect().left;
        return [before, cell.getBoundingClientRect().left];"""
    )
    assert moved[0] <= moved[1] < moved[0] + 20
    site.window(1400)
    site.open("benchmarks/epyc.html")
    lines = site.run("return [...document.querySelectorAll('td code')].map(c => c.getClientRects().length)")
    assert len(lines) > 50
    assert set(lines) <= {0, 1}, "an expression goes on in another line; 0 is folded away"


def test_the_front_page_leads_on(site: Site) -> None:
    site.window(1400)
    site.open("index.html")
    assert site.driver.title == "Block-sparse attention for long sequences - sparseflash"
    assert site.run("return document.querySelectorAll('h1').length") == 1
    tabs = site.run("return [...document.querySelectorAll('.md-tabs__link')].map(tab => tab.textContent.trim())")
    assert tabs == ["Start", "Guides", "Reference", "Benchmarks", "Internals"]
    buttons = site.driver.find_elements("css selector", ".sf-hero .md-button")
    assert len(buttons) == 2
    buttons[0].click()
    assert site.driver.current_url.endswith("/tutorial.html")
    site.driver.find_element("css selector", ".md-footer__link--next").click()
    assert site.driver.current_url.endswith(".html")
    assert "tutorial" not in site.driver.current_url
    assert site.driver.get_log("browser") == []


def test_search_works_from_a_folder_and_finds_no_tests(site: Site) -> None:
    site.window(1400)
    site.open("index.html")
    site.run("document.querySelector('[data-md-toggle=search]').click()")
    field = site.driver.find_element("css selector", ".md-search__input")
    field.send_keys("butterfly")
    found = site.driver.execute_async_script(
        """const done = arguments[0], begun = performance.now();
        (function look() {
          const links = [...document.querySelectorAll(".md-search-result__link")].map(link => link.href);
          if (links.length || performance.now() - begun > 20000) return done(links);
          setTimeout(look, 100);
        })();"""
    )
    assert found
    assert any("gallery.html" in link or "api/patterns.html" in link for link in found)
    assert not [link for link in found if "/tests/" in link]
    assert site.driver.get_log("browser") == []


def test_what_is_wrong_is_noticed(site: Site, tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        "<!doctype html><body><div style='width:2000px'>wide</div><article><img src='none.png'></article>"
        "<a href='gone.html'>gone</a><script>console.error('loud')</script>"
    )
    site.window(1400)
    seen = Site(site.driver, tmp_path).open("bad.html")
    assert seen["overflow"] == 608  # with the body's margin of 8 pixels
    assert seen["wide"][0].startswith("<div style")
    assert [Path(address).name for address in seen["broken"]] == ["none.png"]
    assert [Path(address).name for address in seen["undescribed"]] == ["none.png"]
    assert [Path(address).name for address in seen["links"]] == ["gone.html"]
    assert any("loud" in entry["message"] for entry in site.driver.get_log("browser"))
