"""Pictures and the page of `sakd inspect-spots`: what is drawn, that nothing is loaded, and how a browser shows it."""

import base64
import hashlib
import io
import json
import re
import shutil
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sample_documents import sample
from test_inspection import SPOTS, header, survey

from sakd_cli.cli.app import run
from sakd_cli.documents.spots import EpochRecord, SpotsDocument, TrackedImage
from sakd_cli.errors import UsageError
from sakd_cli.report.render import html, plots
from sakd_cli.report.render.charts import Heat, Lines, Series, drawn, shades, ticks, zoom
from sakd_cli.report.render.html import Answer, Gallery, Opening, Picture, Section, Tile
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.spots import charts
from sakd_cli.report.spots.log import History, history
from sakd_cli.report.spots.page import Seen, spot_page
from sakd_cli.report.spots.survey import measure
from sakd_cli.rundir import RunDir

NASTY = "</script><img src=x onerror=alert(1)>\"'&"
PIXELS = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)


def document(epochs: int = 3, **other: Any) -> SpotsDocument:
    """A small document of two spots and three classes, one of them named in bad faith."""
    classes = ["ball", NASTY, "doll"]
    steps = dict.fromkeys(("router_loss_scaled_up", "router_loss_scaled_down", "count_penalty_active"), 0.5)
    steps |= {"samples": 4, "routed_ce": 2.0, "student_ce": 2.5}
    names = dict.fromkeys(("run", "method", "router", "teacher", "student", "dataset"), NASTY)
    numbers = dict.fromkeys(("fraction", "first", "last", "min", "max", "probability"), 0.5)
    given = {
        "finished": True,
        "epochs": epochs,
        "samples": 12,
        "overall": [spot.model_copy(update=numbers) for spot in SPOTS],
        "by_epoch": [
            {"epoch": n, "fraction": [0.1 * n, 0.5], "probability": [0.1 * n, None], "empty_selection": [0, 0]} | steps
            for n in range(1, epochs + 1)
        ],
        "by_class": [{"name": name, "fraction": [0.5, 0.4], "deviation": [0.0, -0.1]} for name in classes],
        "measured": measure(survey(header=header(classes=classes)), SPOTS, sample=False, seed=0, extremes=2),
    }
    return sample(SpotsDocument, names | given | other)


@pytest.mark.parametrize("panel", [*charts.PANELS, None])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_every_panel_is_drawn_and_drawn_the_same_again(panel: str | None, kind: str) -> None:
    first, again = (plots.rendered(charts.spot_figure(document(), panel), kind) for _ in range(2))
    assert first == again
    if kind == "png":
        pixels = np.asarray(Image.open(io.BytesIO(first)).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "not an empty sheet"
    else:
        assert b"<svg" in first


def test_the_lines_are_those_of_the_report() -> None:
    axes = charts.spot_figure(document(), "epochs").get_axes()[0]
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [line.get_label() for line in solid] == ["stage2", "logits"]
    assert solid[0].get_ydata() == pytest.approx([10, 20, 30])
    heat = charts.spot_figure(document(), "classes").get_axes()[0].images[0]
    assert heat.get_array().shape == (2, 2), "a class without images is left out"
    axes = charts.spot_figure(document(), "paths").get_axes()[0]
    assert sorted(patch.get_width() for patch in axes.patches) == pytest.approx([18.75, 18.75, 31.25, 31.25])
    axes = charts.spot_figure(document(), "difficulty").get_axes()[0]
    assert axes.lines[1].get_ydata() == pytest.approx([100, 0, 100, 50])


def test_many_classes_are_shown_at_both_ends() -> None:
    rows = [{"name": f"n{label}", "fraction": [0.5], "deviation": [0.01 * label]} for label in range(100)]
    report = document(by_class=rows, overall=document().overall[:1], measured=None)
    axes = charts.spot_figure(report, "classes").get_axes()[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert (names[0], names[-1], len(names)) == ("n99", "n0", 24)


def test_what_was_not_kept_is_not_drawn() -> None:
    bare = document(measured=None)
    assert charts.panels_of(bare) == ["epochs", "classes"]
    charts.spot_figure(bare, None)
    with pytest.raises(UsageError, match="nothing to draw it from"):
        charts.spot_figure(bare, "paths")


def test_without_matplotlib_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(["inspect-spots", "--plot", str(tmp_path / "a.png")]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: plots need matplotlib, which is not installed"
    assert hint == "hint: pip install 'sakd[plots]'"
    page = spot_page(document(), Seen({}))
    assert "Samples distilled at each spot, by epoch" in page, "a page needs no matplotlib"
    assert "The trained router by class" in page


class Reader(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def a_history() -> History:
    """Of three epochs; image 11 was distilled at the first spot in the second, and not seen in the third."""
    rows = [[1, 0, 1], [2, 1, 2], [2, 1, 2]]
    spots = [{"name": spot.name, "kind": spot.kind, "by_class": [0.25, 0.5, 1.0]} for spot in SPOTS]
    epochs = [
        sample(EpochRecord, {"epoch": n, "spots": spots, "empty_selection": [0.0, 0.0]}).model_copy(
            update={"tracked": [TrackedImage(index=11, visits=visits, distilled=distilled)]}
        )
        for n, (visits, *distilled) in enumerate(rows, start=1)
    ]
    return History(epochs, ["ball", NASTY, "doll"], {11: "ball"})


def a_page() -> str:
    return spot_page(document(), Seen({10: PIXELS, 11: PIXELS, 12: PIXELS[:1]}, a_history(), ["It helped: 1 < 2."]))


def test_the_page_escapes_every_name_and_loads_nothing() -> None:
    page = a_page()
    assert "onerror=alert" in Reader(page).text
    assert NASTY not in page
    for tag, attributes in Reader(page).tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            if (target := attributes.get(name)) is not None:
                assert re.match(r"#s\d+$|data:image/png;base64,", target)
    assert [tag for tag, _ in Reader(page).tags].count("script") == 1
    assert "http" not in re.sub(r"base64,[^\"]*", "", page).replace("http-equiv", "")
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_the_page_begins_with_the_answer() -> None:
    first = a_page().partition("<nav>")[0]
    for said in (
        "None: all alike, 50.0&nbsp;% of the training samples at each.",
        "They differ most at logits: most often ball (+37.5), least often",
        "It chooses: of the variance of its decisions, knowing the image explains 12.5&nbsp;% at stage2, 73.3&nbsp;%",
        "It helped: 1 &lt; 2.",
        "Distilled most often at logits",
    ):
        assert said in first
    alone = spot_page(document(measured=None), Seen({})).partition("<nav>")[0]
    assert "--with-control" in alone
    assert "--live" in alone


def test_a_saturated_router_is_one_sentence_there_too() -> None:
    page = spot_page(document(saturated="It is saturated.", by_class=[], measured=None), Seen({}, a_history()))
    assert page.count("It is saturated.") == 2, "in the opening, and in front of the details"
    assert page.count("<figure>") == 1, "no charts of the same number everywhere but the first"
    value = np.full((4, 2), [1.0, 0.0], dtype=np.float32)
    same = measure(survey(header=header(), value=value), SPOTS, sample=False, seed=0, extremes=2)
    assert "decides the same for every image" in spot_page(document(measured=same), Seen({}))


def test_images_of_another_survey_are_not_taken_for_the_tracked_ones(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: distill\n")
    records = [epoch.plain() for epoch in a_history().epochs]
    lines = "".join(json.dumps(record) + "\n" for record in [records[0] | {"tracked": []}, *records[1:]])
    (tmp_path / "spots.jsonl").write_text(lines)
    other, own = (history(RunDir(tmp_path), survey(source=source)) for source in ("live", "survey"))
    assert (other.labels, own.labels) == ({}, {11: "class 0"})
    page = spot_page(document(measured=None), Seen({11: PIXELS}, other))
    assert "image 11" in page
    assert 'alt="image 11' not in page
    chart = charts.route_chart(document(), own, 11)
    assert (list(chart.columns), chart.cells) == (["2", "3"], [[50, None], [100, None]]), (
        "from the first epoch on record"
    )


def test_the_complement_of_the_highest_is_distilled_least() -> None:
    other = measure(survey(header=header(complement=True)), SPOTS, sample=False, seed=0, extremes=2)
    first = spot_page(document(measured=other), Seen({10: PIXELS, 11: PIXELS})).partition("<nav>")[0]
    assert "<br>75.0 %" in first.partition("Distilled least often")[2].partition("</ul>")[0]


def test_the_route_of_an_image_is_the_difference_of_its_counts() -> None:
    chart = charts.route_chart(document(), a_history(), 11)
    assert (chart.title, list(chart.rows), list(chart.columns)) == ("ball", ["stage2", "logits"], ["1", "2", "3"])
    assert chart.cells == [[0, 100, None], [100, 100, None]]
    first, _ = charts.history_charts(document(), a_history())
    assert dict(zip(first.rows, first.cells, strict=True))["ball"] == [25, 25, 25]


def test_a_chart_has_its_values_under_the_pointer_and_every_number_legible() -> None:
    curve = Lines("t", "epoch", "top-1, %", [Series("a & b", [1, 2, 3], [10, None, 30], 0)])
    assert "<title>a &amp; b, epoch 3: 30.00 (top-1, %)</title>" in drawn(curve)
    assert drawn(curve).count('class="l" stroke-width') == 2, "a gap is no line"
    cloud = Lines("t", "cost", "top-1, %", [Series("a", range(90), range(90), 0, "marks")])
    assert drawn(cloud).count('<path class="m" d=') == 90, "points without a line always have marks"
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    close, far = ([Series("a", [1, 2], ys, 0)] for ys in ([96.5, 98.2], [60, 98]))
    plainly, part = zoom(curve._replace(series=close))
    assert (plainly.limits, part.limits, part.title) == ((0, 100), (95, 100), "t (zoom)")
    assert "shows 95 to 100 only" in part.note
    assert len(zoom(curve._replace(series=far))) == 1
    heat = Heat("t", ["a name of which the end matters 17"], ["c"], [[5.0]], 10.0, ("less", "more"), signed=True)
    assert "<title>a name of which the end matters 17, c: +5.0</title>" in drawn(heat)
    assert "</title>a name of …matters 17</text>" in drawn(heat)
    assert [shades(heat, value)[1] for value in (-10, 0, 10)] == ["#fff", "#000", "#fff"]


def test_the_page_shows_the_extreme_images() -> None:
    extremes = re.search(r'<section id="s\d+"><h2>Extremes</h2>.*?</section>', a_page(), re.DOTALL)
    assert extremes is not None
    sources = [tag["src"] or "" for name, tag in Reader(extremes[0]).tags if name == "img"]
    images = [base64.b64decode(source.partition(",")[2]) for source in sources if source.startswith("data:image/png")]
    assert len(images) == 2 * 2 * 2 - 1, "two at each end of two spots; one has no picture"
    shown = np.asarray(Image.open(io.BytesIO(images[0])))
    assert np.array_equal(shown, PIXELS.transpose(1, 2, 0))


def test_a_page_of_any_sections() -> None:
    blocks = [Sheet("T", ["a"], [["1"]], ["note"], text=0), Gallery("G", [])]
    blocks.append(Gallery("H", [Tile(Picture(b"y", "tile"), ["one", "two"])]))
    opening = Opening([Answer("why?", ["so"])], blocks[:1])
    reader = Reader(html.page("title", [("fact", "value")], [Section("section", blocks, "what?")], opening))
    for word in ("title", "fact", "value", "section", "note", "T", "G", "one", "two", "why?", "so", "what?"):
        assert word in reader.text


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
    other = spot_page(many, Seen({}))
    for content in (a_page(), other):
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
    assert len(loaded) == 3 + 3 + 7 + 1, "opening, paths, extremes, tracked: image 13 has no picture"
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
