"""Pictures and the page of `sakd inspect-spots`: what is drawn, that nothing is loaded, and how a browser shows it."""

import base64
import hashlib
import io
import json
import re
import sys
from html.parser import HTMLParser
from itertools import combinations
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
from sakd_cli.report.render.charts import Heat, Lines, Series, dashes, drawn, shades, smoothed, ticks, zoom
from sakd_cli.report.render.html import Answer, Gallery, Opening, Section, Tile
from sakd_cli.report.render.sheet import Sheet
from sakd_cli.report.spots import charts
from sakd_cli.report.spots.findings import findings
from sakd_cli.report.spots.log import History, history
from sakd_cli.report.spots.page import PageContext, spot_page
from sakd_cli.report.spots.survey import GROUPS, measure
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
    page = spot_page(document(), PageContext({}))
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


# What people without one kind of cone see of linear RGB (Machado, Oliveira and Fernandes, IEEE TVCG 2009, table 1).
SIGHTS = {
    "all cones": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])  # of sRGB


def linear(colour: str) -> Any:
    values = np.array([int(colour[k : k + 2], 16) for k in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(rgb: Any) -> Any:
    root = np.cbrt(np.maximum(XYZ @ np.clip(rgb, 0, 1) / XYZ.sum(axis=1), 0.0089))
    return np.array([116 * root[1] - 16, 500 * (root[0] - root[1]), 200 * (root[1] - root[2])])


@pytest.mark.parametrize("theme", [0, 1])
@pytest.mark.parametrize("sight", list(SIGHTS))
def test_curves_differ_for_every_kind_of_sight(theme: int, sight: str) -> None:
    ground = re.findall(r"--bg:(#\w+)", html.STYLE)[theme]
    colours = [re.findall(rf"--{k}:(#\w+)", html.STYLE)[theme] for k in range(6)]
    full = ground if len(ground) == 7 else "#" + "".join(2 * digit for digit in ground[1:])
    light = [XYZ[1] @ linear(colour) for colour in (*colours, full)]
    assert all((max(one, light[-1]) + 0.05) / (min(one, light[-1]) + 0.05) >= 3 for one in light[:-1])
    seen = [lab(np.array(SIGHTS[sight]) @ linear(colour)) for colour in colours]
    assert min(float(np.linalg.norm(a - b)) for a, b in combinations(seen, 2)) > 10


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
    return spot_page(
        document(), PageContext({10: PIXELS, 11: PIXELS, 12: PIXELS[:1]}, a_history(), "It helped: 1 < 2.")
    )


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
    shares = (("ball", 0.9, 0.275), ("doll", 0.625, 0.0), (NASTY, 0.35, -0.275))
    rows = [{"name": name, "fraction": [0.5, share], "deviation": [0.0, less]} for name, share, less in shares]
    overall = [document().overall[0], document().overall[1].model_copy(update={"fraction": 0.625})]
    report = document(by_class=rows, overall=overall, samples=12_000)
    seen = PageContext({10: PIXELS, 11: PIXELS}, a_history(), "It helped: 1 < 2.")
    first = spot_page(report, seen).partition("<nav>")[0]
    few = spot_page(report.model_copy(update={"samples": 12}), seen).partition("<nav>")[0]
    assert "For no class is it shown: coins of one rate would differ as much" in few
    assert "most often ball" not in few
    for said in (
        "logits, for 62.5&nbsp;% of the training samples; then stage2 50.0&nbsp;%.",
        "an image can use several",
        "They differ most at logits: most often ball 90.0&nbsp;% (+27.5), least often",
        "It chooses: which image it is explains 12.5&nbsp;% at stage2, 73.3&nbsp;% at logits of the variance",
        "It helped: 1 &lt; 2.",
        "Images distilled most often at logits (trained router)",
    ):
        assert said in first
    alone = spot_page(document(measured=None), PageContext({})).partition("<nav>")[0]
    assert "--with-control" in alone
    assert "--live" in alone
    assert "None: all alike, 50.0&nbsp;% of the training samples at each." in alone
    weak = [spot.model_copy(update={"gradient_ratio": 0.013}) for spot in document().overall]
    opening = spot_page(document(overall=weak), PageContext({})).partition("<nav>")[0]
    assert "stage2 hardly acts: ratio 0.013" in opening


def test_every_question_is_answered_from_the_numbers() -> None:
    bins = [{"images": 30, "confidence": 0.9, "correct": 0.6}, {"images": 10, "confidence": 0.5, "correct": 0.6}]
    report = document()
    assert report.measured is not None
    assert report.measured.routed is not None
    scores = {"images": 40, "student": {"top1": 60.0, "loss": 1.0}, "sampled": {"top1": 42.5, "loss": 2.0}}
    scores["sampled"] |= {"draws": 3, "top1_std": 0.5}
    scores |= {"teacher": {"top1": 70.0, "loss": 1.0}, "student_reliability": bins}
    routed = type(report.measured.routed).model_validate(scores)
    spots = [report.overall[0].model_copy(update={"first": 0.25, "last": 0.75}), report.overall[1]]
    update = {"measured": report.measured.model_copy(update={"routed": routed}), "overall": spots}
    epochs = a_history().epochs
    epochs[-1].tracked.append(TrackedImage(index=12, visits=2, distilled=[2, 2]))
    said = findings(report.model_copy(update=update), epochs)
    assert all(said.values()), said
    expected = {
        "In training": "stage2 changed most: 25.0 % of the samples in the first epoch, 75.0 % in the last.",
        "Class by epoch": "They lay furthest apart in epoch 1 of 3, at stage2: by 75.0 points.",
        "By difficulty": "At logits, where the ends differ most, the hardest tenth is distilled 50.0 points less often",
        "One image": "image 12 was distilled most often, at 100.0 %, image 11 least, at 75.0 %.",
        "Reliability": "the student is 20.0 points too sure",
        "The routed network": "−17.50 points against the student of this run alone, on the same 40 test images.",
    }
    for title, words in expected.items():
        assert words in said[title]
    page = spot_page(report, PageContext({}))
    for title in re.findall(r"<h2>(.*?)</h2>", page):
        part = page.partition(f"<h2>{title}</h2>")[2].partition("</section>")[0]
        assert 'class="answer"' in part or title == "The routed network", title
        assert f"<h3>{title}</h3>" not in part, "no heading twice"


def test_a_long_noisy_curve_is_a_running_mean_before_its_own_values() -> None:
    wave = [50.0 + 10 * (-1) ** n for n in range(240)]
    chart = Lines("t", "epoch", "%", [Series("a", range(1, 241), [*wave[:-1], None], 0)], note="N.")
    faint, line = smoothed(chart).series
    assert (faint.kind, faint.name, list(faint.y)) == ("faint", None, [*wave[:-1], None])
    known = [y for y in line.y if y is not None]
    assert (len(line.y), line.y[-1], line.name) == (240, None, "a")
    assert max(known) - min(known) < 4, "of 20"
    assert smoothed(chart).note == "N. Lines: running means of 15 values (epoch); faint: each value."
    assert drawn(chart).count('<g class="c0" opacity=".3">') == 1
    [axes] = plots.figure_of([chart]).get_axes()
    assert [curve.get_alpha() for curve in axes.lines] == [0.3, None]
    short = chart._replace(series=[Series("a", range(40), wave[:40], 0)])
    assert smoothed(short) == short
    rise = Lines("t", "epoch", "%", [Series("a", [1, 2, 3, 4], [10.0, 40.0, 60.0, 62.0], 0)])
    assert [list(one.series[0].x) for one in zoom(rise)] == [[1, 2, 3, 4], [3, 4]]
    assert zoom(rise)[1].limits == (59, 64)


def test_maps_of_all_spots_have_one_scale() -> None:
    epochs = a_history().epochs
    apart = [spot.model_copy(update={"by_class": [0.1, 0.9, 1.0]}) for spot in epochs[0].spots[:1]]
    other = epochs[0].model_copy(update={"spots": [*apart, *epochs[0].spots[1:]]})
    maps = charts.history_charts(document(), a_history()._replace(epochs=[other, *epochs[1:]]))
    scales = [(one.least, one.most) for one in maps if isinstance(one, Heat)]
    assert scales == [(10.0, 90.0)] * 2, "the class without a deviation is not shown"
    colours = [html.PALETTE[k] for k in range(6)]
    lines = [Series(str(k), [1, 2], [k, k], k) for k in range(6)]
    [axes] = plots.figure_of([Lines("t", "x", "y", lines)]).get_axes()
    assert [line.get_color() for line in axes.lines] == colours, "one palette for pages and files"


def test_curves_on_each_other_are_both_seen_and_equally_thin() -> None:
    same, other = [Series(name, [1, 2], [50.0, 60.0], k) for k, name in enumerate("ab")], Series("c", [1, 2], [9, 9], 2)
    chart = Lines("t", "epoch", "%", [*same, other])
    assert dashes(chart) == ["", "8 8", ""]
    assert len({*re.findall(r'stroke-width="([\d.]+)"', drawn(chart))}) == 1
    flat = Heat("t", ["r"], ["1", "2"], [[20.0, 40.0]], 40.0, ("a", "b"), least=20.0)
    assert shades(flat, 20.0)[0] == "#f6f7f8"
    assert shades(flat, 20.0, dark=True) == ("#1e252d", "#fff"), "nothing is not the brightest in the dark"


def test_a_saturated_router_is_one_sentence_there_too() -> None:
    page = spot_page(document(saturated="It is saturated.", by_class=[], measured=None), PageContext({}, a_history()))
    assert page.count("It is saturated.") == 2, "in the opening, and in front of the details"
    assert page.count("<figure>") == 1, "no charts of the same number everywhere but the first"
    value = np.full((4, 2), [1.0, 0.0], dtype=np.float32)
    same = measure(survey(header=header(), value=value), SPOTS, sample=False, seed=0, extremes=2)
    assert "decides the same for every image" in spot_page(document(measured=same), PageContext({}))


def test_images_of_another_survey_are_not_taken_for_the_tracked_ones(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: distill\n")
    records = [epoch.plain() for epoch in a_history().epochs]
    lines = "".join(json.dumps(record) + "\n" for record in [records[0] | {"tracked": []}, *records[1:]])
    (tmp_path / "spots.jsonl").write_text(lines)
    other, own = (history(RunDir(tmp_path), survey(source=source)) for source in ("live", "survey"))
    assert (other.labels, own.labels) == ({}, {11: "class 0"})
    page = spot_page(document(measured=None), PageContext({11: PIXELS}, other))
    assert "image 11" in page
    assert 'alt="image 11' not in page
    chart = charts.route_chart(document(), own, 11)
    assert (list(chart.columns), chart.cells) == (["2", "3"], [[50, None], [100, None]]), (
        "from the first epoch on record"
    )


def test_the_complement_of_the_highest_is_distilled_least() -> None:
    other = measure(survey(header=header(complement=True)), SPOTS, sample=False, seed=0, extremes=2)
    first = spot_page(document(measured=other), PageContext({10: PIXELS, 11: PIXELS})).partition("<nav>")[0]
    assert "<br>75.0 %" in first.partition("distilled least often")[2].partition("</ul>")[0]


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
    epochs = Lines("t", "epoch", "nats", [Series("a", [1, 2, 3], [1e29, 2e29, 3e9], 0)], None)
    assert re.findall(r'class="soft mid"[^>]*>([^<]+)', drawn(epochs))[1:] == ["1", "2", "3"], "epochs have no halves"
    assert min(map(float, re.findall(r'x="([\d.]+)" y="[\d.]+" class="soft end"', drawn(epochs)))) > 6.3 * 7
    one = Lines("t", "cost, %", "top-1, %", [Series("a", [46.8965517, 46.8965518], [28, 28], 0, "marks")])
    places = re.findall(r'class="soft mid"[^>]*>([^<]+)', drawn(one))[1:]
    assert len(places) == len({*places}) > 3, "a place that is rounded is one"
    heads = [f"stage{k}/resnet20" for k in range(5)]
    two = re.findall(r">([^<]+)</text>", drawn(Heat("t", ["r"], heads, [[0.5] * 5], 1.0, ("0", "1"))))
    assert two[:4] == ["stage0/", "resnet20", "stage1/", "resnet20"], "whole, in two lines"
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    close, far = ([Series("a", [1, 2], ys, 0)] for ys in ([96.5, 98.2], [60, 98]))
    plainly, part = zoom(curve._replace(series=close))
    assert (plainly.limits, part.limits, part.title) == ((0, 100), (95, 100), "t (zoom)")
    assert "shows 95 to 100 only" in part.note
    assert len(zoom(curve._replace(series=far))) == 1
    heat = Heat("t", ["a name of which the end matters 17"], ["c"], [[5.0]], 10.0, ("less", "more"), signed=True)
    assert "<title>a name of which the end matters 17, c: +5.0</title>" in drawn(heat)
    assert "</title>a name o…ters 17</text>" in drawn(heat)
    assert [shades(heat, value)[1] for value in (-10, 0, 10)] == ["#fff", "#000", "#fff"]
    groups = charts.Bars("t", "%", ["s"], [(f"{name} (10 300)", [50.0], []) for name in GROUPS])
    assert "…" not in drawn(groups), "names of our own are whole"


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
    blocks.append(Gallery("H", [Tile(b"y", "tile", ["one", "two"])]))
    opening = Opening([Answer("why?", ["so"])], [blocks[:1]])
    reader = Reader(html.page("title", [("fact", "value")], [Section("section", blocks, "what?")], opening))
    for word in ("title", "fact", "value", "section", "note", "T", "G", "one", "two", "why?", "so", "what?"):
        assert word in reader.text
