"""`sakd report`: a run on one page, from its directory alone

PARTS is what the page is made of. A training procedure that leaves something of its own in the run directory adds a
function there, which adds nothing for runs that have nothing of the kind.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group

from sakd_cli.config.resolve import flat
from sakd_cli.documents.table import Comparison, Report
from sakd_cli.errors import UsageError
from sakd_cli.files import write_aside
from sakd_cli.report.evaluation.ensemble import curve_table, ensemble_summary
from sakd_cli.report.render import html, plots
from sakd_cli.report.render.format import fixed, named
from sakd_cli.report.render.html import Block, Picture, Section
from sakd_cli.report.render.sheet import Sheet, table
from sakd_cli.report.runs.compare import compare
from sakd_cli.report.runs.compare_tables import curve_figure
from sakd_cli.report.runs.tables import summary_table
from sakd_cli.report.spots.log import RECORD, read_mixtures, spots_document
from sakd_cli.report.spots.page import spot_sections
from sakd_cli.report.spots.survey import read_survey
from sakd_cli.report.spots.tables import mixture_table
from sakd_cli.rundir import RunDir

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class RunPage:
    """The page of a run while it is made; `plotted`: with plots, which need matplotlib, as PNG files beside it too."""

    def __init__(self, run: RunDir, *, plotted: bool) -> None:
        self.run, self.plotted = run, plotted
        self.comparison: Comparison = compare([run])
        self.sections: list[Section] = []
        self.plots: dict[str, bytes] = {}
        for part in PARTS:
            part(self)

    def add(self, title: str, blocks: Sequence[Any]) -> None:
        """A section."""
        self.sections.append(Section(title, blocks))

    def add_plot(self, title: str, blocks: list[Block], name: str, alt: str, draw: Callable[[], "Figure"]) -> None:
        """A section below a plot."""
        if self.plotted:
            figure = draw()
            blocks = [Picture(plots.rendered(figure, "svg"), "svg+xml", alt), *blocks]
            self.plots[name] = plots.rendered(figure, "png")
        self.add(title, blocks)

    def write(self, path: Path) -> Report:
        """Save the page, and each plot as `<page>-<name>.png` beside it."""
        row = self.comparison.runs[0]
        facts = html.facts_of(row, ("network", "dataset", "method", "router", "seed", "epochs"))
        facts += [("State", "finished" if row.finished else "not finished"), ("Run", named(row.run))]
        page = html.page(f"{named(row.task)}: {named(self.run.path.name)}", facts, self.sections)
        write_aside(path, page.encode())
        pictures = {path.with_name(f"{path.stem}-{name}.png"): content for name, content in self.plots.items()}
        for picture, content in pictures.items():
            write_aside(picture, content)
        written, sections = list(map(str, [path, *pictures])), [section.title for section in self.sections]
        return Report(run=str(self.run.path), written=written, sections=sections)


def _result(page: RunPage) -> None:
    if page.run.finished:
        summary = summary_table(page.run.summary)
        page.add("Result", summary.renderables if isinstance(summary, Group) else [summary])


def _curves(page: RunPage) -> None:
    if not (curve := page.comparison.runs[0].curve):
        return
    columns = {
        "Epoch": lambda point: str(point.epoch),
        "Top-1 %": lambda point: fixed(point.top1, 2),
        "Loss": lambda point: fixed(point.loss, 3),
        "Training top-1 %": lambda point: fixed(point.train_top1, 2),
        "Training loss": lambda point: fixed(point.train_loss, 3),
    }
    selected = next((point.selected_on for point in curve if point.selected_on), None)
    sheet = table("By epoch", curve, columns, [f"Top-1 and loss on the validation set ({named(selected)})."], text=0)
    alt = "Lines: accuracy and loss by epoch"
    page.add_plot("Curves", [sheet], "curves", alt, lambda: curve_figure(page.comparison))


def _spots(page: RunPage) -> None:
    if not (page.run.path / RECORD).is_file():
        return
    try:
        survey = read_survey(page.run)
        report = spots_document(page.run, survey)
    except UsageError:  # no epoch is finished, or the record is damaged: `inspect-spots` says which
        return
    if page.plotted:
        page.plots["spots"] = plots.rendered(plots.spot_figure(report, None), "png")
    page.sections += spot_sections(report, survey.images if survey else {}, drawn=page.plotted)


def _mixtures(page: RunPage) -> None:
    try:
        record = read_mixtures(page.run)
    except UsageError:  # damaged: `inspect-spots` says how
        return
    if record is not None:
        title, alt = "Mixtures of the teacher's blocks", "Heat map: weight of every block"
        page.add_plot(title, [mixture_table(record)], "mixtures", alt, lambda: plots.mixture_map(record))


def _residual(page: RunPage) -> None:
    if page.run.finished and (found := page.run.summary.ensemble):
        tables: list[Any] = [ensemble_summary(found), curve_table(found.curve)]
        plot = (found.curve, found.early, found.early.top1, "thresholds in use")
        alt = "Curve: accuracy by mean cost"
        page.add_plot("Residual students", tables, "exits", alt, lambda: plots.exit_curve(*plot))


def _environment(page: RunPage) -> None:
    with suppress(UsageError):  # there is no such file, or it is damaged
        page.add("Environment", [_keys("Where and how it ran", page.run.read_json("env.json"))])


def _settings(page: RunPage) -> None:
    page.add("Settings", [_keys("config.yaml", flat(page.run.config))])


def _keys(title: str, found: Mapping[str, Any]) -> Sheet:
    rows = [[named(key), named(value)] for key, value in found.items()]
    return Sheet(title, ("Key", "Value"), rows, text=2)


PARTS = (_result, _curves, _spots, _mixtures, _residual, _environment, _settings)
