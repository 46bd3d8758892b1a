"""Pictures and the page of `sakd inspect-spots`: what is drawn, that nothing is loaded, and how a browser shows it."""

import base64
import hashlib
import io
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
from sakd_cli.documents.spots import SpotsDocument
from sakd_cli.errors import UsageError
from sakd_cli.report.render import html, plots
from sakd_cli.report.render.html import Gallery, Picture, Section, Tile
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.spots.page import spot_page
from sakd_cli.report.spots.survey import measure

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


@pytest.mark.parametrize("panel", [*plots.PANELS, None])
@pytest.mark.parametrize("kind", ["png", "svg"])
def test_every_panel_is_drawn_and_drawn_the_same_again(panel: str | None, kind: str) -> None:
    first, again = (plots.rendered(plots.spot_figure(document(), panel), kind) for _ in range(2))
    assert first == again
    if kind == "png":
        pixels = np.asarray(Image.open(io.BytesIO(first)).convert("RGB"))
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, "not an empty sheet"
    else:
        assert b"<svg" in first


def test_the_lines_are_those_of_the_report() -> None:
    axes = plots.spot_figure(document(), "epochs").get_axes()[0]
    solid = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert [line.get_label() for line in solid] == ["stage2", "logits"]
    assert solid[0].get_ydata() == pytest.approx([10, 20, 30])
    heat = plots.spot_figure(document(), "classes").get_axes()[0].images[0]
    assert heat.get_array().shape == (2, 2), "a class without images is left out"
    axes = plots.spot_figure(document(), "paths").get_axes()[0]
    assert sorted(patch.get_width() for patch in axes.patches) == pytest.approx([18.75, 18.75, 31.25, 31.25])
    axes = plots.spot_figure(document(), "difficulty").get_axes()[0]
    assert axes.lines[1].get_ydata() == pytest.approx([100, 0, 100, 50])


def test_many_classes_are_shown_at_both_ends() -> None:
    rows = [{"name": f"n{label}", "fraction": [0.5], "deviation": [0.01 * label]} for label in range(100)]
    report = document(by_class=rows, overall=document().overall[:1], measured=None)
    axes = plots.spot_figure(report, "classes").get_axes()[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert (names[0], names[-1], len(names)) == ("n99", "n0", 24)


def test_what_was_not_kept_is_not_drawn() -> None:
    bare = document(measured=None)
    assert plots.panels_of(bare) == ["epochs", "classes"]
    plots.spot_figure(bare, None)
    with pytest.raises(UsageError, match="nothing to draw it from"):
        plots.spot_figure(bare, "paths")


def test_without_matplotlib_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run(["inspect-spots", "--plot", str(tmp_path / "a.png")]) == 2
    error, hint = capsys.readouterr().err.splitlines()
    assert error == "error: plots need matplotlib, which is not installed"
    assert hint == "hint: pip install 'sakd[plots]'"
    page = spot_page(document(), {}, drawn=False)
    assert "image/svg" not in page
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


def a_page() -> str:
    return spot_page(document(), {10: PIXELS, 11: PIXELS, 12: PIXELS[:1]}, drawn=True)


def test_the_page_escapes_every_name_and_loads_nothing() -> None:
    page = a_page()
    assert "onerror=alert" in Reader(page).text
    assert NASTY not in page
    for tag, attributes in Reader(page).tags:
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("src", "href"):
            if (target := attributes.get(name)) is not None:
                assert re.match(r"#s\d+$|data:image/(png|svg\+xml);base64,", target)
    assert [tag for tag, _ in Reader(page).tags].count("script") == 1
    assert "http" not in re.sub(r"base64,[^\"]*", "", page).replace("http-equiv", "")
    script = re.search(r"<script>(.*)</script>", page, re.DOTALL)
    assert script is not None
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page


def test_the_page_shows_the_extreme_images() -> None:
    sources = [tag["src"] or "" for name, tag in Reader(a_page()).tags if name == "img"]
    images = [base64.b64decode(source.partition(",")[2]) for source in sources if source.startswith("data:image/png")]
    assert len(images) == 2 * 2 * 2 - 1, "two at each end of two spots; one has no picture"
    shown = np.asarray(Image.open(io.BytesIO(images[0])))
    assert np.array_equal(shown, PIXELS.transpose(1, 2, 0))


def test_a_page_of_any_sections() -> None:
    blocks = [Sheet("T", ["a"], [["1"]], ["note"], text=0), Picture(b"x", "png", "alt"), Gallery("G", [])]
    blocks.append(Gallery("H", [Tile(Picture(b"y", "png", "tile"), ["one", "two"])]))
    reader = Reader(html.page("title", [("fact", "value")], [Section("section", blocks)]))
    for word in ("title", "fact", "value", "section", "note", "T", "G", "one", "two"):
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


@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_shows_the_page_at_every_width(browser: Any, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(a_page(), encoding="utf-8")
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((tmp_path / "page.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    loaded = browser.execute_script("return Array.from(document.images).map(i => i.complete && i.naturalWidth > 0)")
    assert len(loaded) == 11
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
