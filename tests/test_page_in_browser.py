"""Pages in a browser: nothing cut, pale or too wide at any width, in light, in dark and on paper; tables that sort."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_inspection import SPOTS, header, survey
from test_spot_page import PIXELS, a_page, document

from sakd_cli.report.render import html
from sakd_cli.report.render.html import Section
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.spots.page import PageContext, spot_page
from sakd_cli.report.spots.survey import measure


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of the system, told not to look for another one."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium with chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for word in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver)) as opened:
        yield opened


# Every text on the page that is seen: its colour against the first background below it that is opaque, its box against
# the window and the picture that it is in, and what is larger than its box though it cannot be scrolled.
MEASURED = """
const seen = (e, key) => {while (e) {const c = getComputedStyle(e)[key].match(/[\\d.]+/g).map(Number);
  if (c.length < 4 || c[3] > 0.99) return c.slice(0, 3); e = e.parentElement} return [255, 255, 255]};
const light = c => c.map(v => (v /= 255) <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, k) => sum + v * [0.2126, 0.7152, 0.0722][k], 0);
const faults = [], width = document.documentElement.clientWidth;
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, e = node.parentElement, said = node.textContent.trim().slice(0, 40);
  if (!said || e.closest("title,script")) continue;
  const range = document.createRange(); range.selectNodeContents(node);
  const box = range.getBoundingClientRect(), svg = e.closest("svg");
  const cell = svg && e.parentElement.querySelector("rect[fill^='#']");
  const under = cell && cell.parentElement === e.parentElement && cell.parentElement.tagName === "g"
    ? seen(cell, "fill") : seen(svg ? svg.parentElement : e, "backgroundColor");
  const [a, b] = [light(seen(e, svg ? "fill" : "color")), light(under)].sort((x, y) => y - x);
  if ((a + 0.05) / (b + 0.05) < 4.5) faults.push(["contrast", said]);
  if (e.closest(".wide")) continue;
  if (box.left < -1 || box.right > width + 1) faults.push(["outside", said]);
  if (svg) {const frame = svg.getBoundingClientRect();
    if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.bottom > frame.bottom + 1
        || box.top < frame.top - 1) faults.push(["cut", said])}
}
document.querySelectorAll("body *").forEach(e => {
  if (!e.closest(".wide,svg") && e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
    faults.push(["wide", e.outerHTML.slice(0, 60)]);
  if (e.matches("th button") && e.scrollWidth > e.clientWidth) faults.push(["head", e.textContent])});
if (document.documentElement.scrollWidth > width) faults.push(["overflow", "page"]);
return faults"""


def shown(browser: Any, page: Path, width: int, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen", "features": features})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(page.as_uri())


@pytest.mark.parametrize("width", [390, 768, 1440])
def test_nothing_is_cut_or_pale_at_any_width_in_light_or_dark(browser: Any, tmp_path: Path, width: int) -> None:
    rows = [
        {"name": f"{'猫' * 30} {label}", "fraction": [0.5] * 10, "deviation": [0.01 * label - 0.2] * 10}
        for label in range(40)
    ]
    page = tmp_path / "page.html"
    first = document().overall[0]
    spots = [first.model_copy(update={"name": f"WIDEST{k}.stage"}) for k in range(10)]
    epochs = [document().by_epoch[0].model_copy(update=dict.fromkeys(("fraction", "probability"), [0.5] * 10))]
    many = document().model_copy(update={"overall": spots, "by_epoch": epochs, "measured": None})
    many = many.model_copy(update={"by_class": document(by_class=rows).by_class})
    other = spot_page(many, PageContext({}))
    names = ["a_class_name_" * 8, "猫" * 40, "doll"]
    shares = [
        {"name": name, "fraction": [0.5, 0.2 * k], "deviation": [0.0, 0.2 * k - 0.5]} for k, name in enumerate(names)
    ]
    known = measure(survey(header=header(classes=names)), SPOTS, sample=False, seed=0, extremes=2)
    long = spot_page(document(by_class=shares, measured=known, samples=12_000), PageContext({10: PIXELS, 11: PIXELS}))
    for content in (a_page(), other, long):
        page.write_text(content, encoding="utf-8")
        for scheme in ("light", "dark"):
            shown(browser, page, width, scheme)
            dark = browser.execute_script("return matchMedia('(prefers-color-scheme: dark)').matches")
            assert dark == (scheme == "dark")
            assert browser.execute_script(MEASURED) == []


def test_the_measures_see_what_is_wrong(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(a_page().replace("--soft:#57606a", "--soft:#c7cdd3"), encoding="utf-8")
    shown(browser, page, 390, "light")
    assert {kind for kind, _ in browser.execute_script(MEASURED)} == {"contrast"}
    browser.execute_script("document.querySelector('section figcaption').style.width = '500px'")
    browser.execute_script("document.querySelector('figure svg').viewBox.baseVal.width = 150")
    assert {"wide", "overflow", "cut"} <= {kind for kind, _ in browser.execute_script(MEASURED)}


def test_on_paper_tables_are_whole(browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(a_page(), encoding="utf-8")
    shown(browser, tmp_path / "page.html", 700, "dark")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    cut = "return Array.from(document.querySelectorAll('.wide')).filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.execute_script(cut) == 0
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "screen"})


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page_at_every_width(browser: Any, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(a_page(), encoding="utf-8")
    shown(browser, tmp_path / "page.html", width, "light")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    loaded = browser.execute_script("return Array.from(document.images).map(i => i.complete && i.naturalWidth > 0)")
    assert len(loaded) == 4 + 3 + 7 + 1, "opening, paths, extremes, tracked: image 13 has no picture"
    assert all(loaded)
    heads = (
        "return Array.from(document.querySelectorAll('th button')).filter(b => b.scrollWidth > b.clientWidth).length"
    )
    assert browser.execute_script(heads) == 0, "no header is cut"
    assert browser.get_log("browser") == []


def test_a_click_sorts_a_table_by_number_and_by_name(browser: Any, tmp_path: Path) -> None:
    rows = [["9.5", "b"], ["10 000", "a"], ["–", "d"], ["−3.0", "c"], ["12.0 +1.0", "e"]]
    sheet = Sheet("T", ["figure", "name"], rows, text=["name"])
    (tmp_path / "page.html").write_text(html.page("t", [], [Section("s", [sheet])]), encoding="utf-8")
    browser.get((tmp_path / "page.html").as_uri())

    def clicked(column: int) -> list[str]:
        browser.execute_script(f"document.querySelectorAll('th button')[{column}].click()")
        cells = "return Array.from(document.querySelectorAll('tbody tr')).map(r => r.cells[1].textContent)"
        return list(browser.execute_script(cells))

    assert clicked(0) == ["c", "b", "e", "a", "d"]
    assert clicked(0) == ["a", "e", "b", "c", "d"], "what is no number stays last"
    assert clicked(1) == ["a", "b", "c", "d", "e"]
    assert browser.execute_script("return document.querySelectorAll('th')[1].getAttribute('aria-sort')") == "ascending"
