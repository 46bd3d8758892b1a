"""Class names and paths in any script, and with any sign, in what is written for people and for spreadsheets."""

import csv
import io
import warnings
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from sakd_cli.cli import console
from sakd_cli.report.render import plots
from sakd_cli.report.render.format import csv_text
from sakd_cli.report.render.sheet import Sheet

NAMES = ["猫", "собака", "a$b$c^", "naïve"]


def labelled(names: list[str]) -> Figure:
    figure = plots.new_figure()
    axes = figure.subplots()
    axes.set_yticks(range(len(names)), names)
    axes.set_title(names[0])
    return figure


def test_a_character_without_a_font_stands_as_its_number_in_a_png_and_as_text_in_an_svg(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plots, "_fonts_with", lambda wanted: ([], wanted))
    figure = labelled(NAMES)
    with warnings.catch_warnings(action="error"):
        svg = plots.rendered(figure, "svg").decode()
        assert plots.rendered(figure, "png").startswith(b"\x89PNG")
        assert figure.axes[0].get_title() == "猫"
        with plots.all_scripts(figure, "png"):
            shown = [label.get_text() for label in figure.axes[0].get_yticklabels()]
            figure.draw_without_rendering()
            assert all(label.get_text() for label in figure.axes[0].get_xticklabels()), "numbers stay where they are"
    assert shown == ["U+732B ", *NAMES[1:]]
    assert ">猫<" in svg
    assert ">a$b$c^<" in svg


def test_a_font_of_the_machine_that_has_the_characters_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    other = "DejaVu Sans Mono"
    has = {font.fname: frozenset("猫") for font in fontManager.ttflist if font.name == other}
    monkeypatch.setattr(plots, "characters", lambda path: has.get(path, frozenset(map(chr, range(0x250)))))
    plots._fonts_with.cache_clear()
    figure = labelled(["猫", "cat"])
    with plots.all_scripts(figure, "png"):
        title, plain = figure.axes[0].title, figure.axes[0].get_yticklabels()[1]
        assert title.get_fontfamily() == ["sans-serif", other]
        assert title.get_text() == "猫"
        assert plain.get_fontfamily() == ["sans-serif"]
    plots._fonts_with.cache_clear()


def test_a_font_that_has_a_box_for_everything_has_nothing() -> None:
    assert not any("Last Resort" in name for name in plots._fonts_with(frozenset("猫𓀀"))[0])


def test_latin_names_are_drawn_as_before() -> None:
    assert b"<text" not in plots.rendered(labelled(["cat", "naïve"]), "svg")


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_no_cell_of_a_csv_is_a_formula(name: str, tmp_path: Path) -> None:
    rows = [{"class": name, "value": -1.5}, {"class": "a=b", "value": None}]
    (first, second) = csv.DictReader(io.StringIO(csv_text(["class", "value"], rows), newline=""))
    assert first == {"class": "'" + name.replace("\r", "\\r"), "value": "-1.5"}
    assert second == {"class": "a=b", "value": ""}


def test_a_word_between_colons_is_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    console.complain("m.csv:train: lacks", ":cat:")
    console.show("photos:train:", Sheet("Parts", ("Part",), [[":train:"]]))
    shown = capsys.readouterr()
    assert shown.err == "error: m.csv:train: lacks\nhint: :cat:\n"
    assert shown.out.count(":train:") == 2
