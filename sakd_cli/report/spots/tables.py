"""The document of `sakd inspect-spots` as tables, for terminal and HTML report alike"""

from sakd_cli.documents import spots as doc
from sakd_cli.documents.base import Number
from sakd_cli.documents.training import Mixtures
from sakd_cli.report.render.format import DASH, SPLITS, WHAT, bar, deviation, fixed, fraction, named, p_value, whole
from sakd_cli.report.render.sheet import Sheet, both_ends, columns_of, left_out, table, thinned

ClassRow = tuple[doc.ClassDeviation, list[str], list[Number]]  # with more cells, and its means
EPOCH_ROWS = 20
PATHS = 10
WEAK, STRONG = 0.05, 20.0  # gradient ratios beyond which a loss is hardly there, or drowns the task
STEPS = {
    "router_loss_scaled_up": "Loss × γ",
    "router_loss_scaled_down": "Loss ÷ γ",
    "count_penalty_active": "Count penalty",
}
LETTERS = "A letter per spot, whose part is used there: T the teacher's (the student is distilled), S the student's"
DECILE = ("Images", "Student top-1", "Teacher top-1")
NETWORKS = {
    "student": "student",
    "teacher": "teacher",
    "sampled": "routed, sampled gates",
    "all_student": "routed, student everywhere",
    "all_teacher": "routed, teacher everywhere",
}


def spot_tables(report: doc.SpotsDocument, *, top: int | None = 10) -> list[Sheet]:
    """The training: overall, by epoch, the `top` classes above and below the average (None: all), mixtures."""
    alike = _nothing_varies(report)
    constant = bool(report.saturated) or alike
    tables = [_overall(report, alike or len(report.by_epoch) == 1)]
    if not constant:
        tables.append(_by_epoch(report, EPOCH_ROWS if top is not None else len(report.by_epoch)))
    names = [spot.name for spot in report.overall]
    if top != 0 and not constant and any(row.peak is not None for row in report.by_class):
        notes = ["Mean over the epochs, then the difference from the spot's fraction in points."]
        if len(names) > 1:
            notes.append("Ranked by the largest difference at any spot, from the highest to the lowest.")
        rows: list[ClassRow] = [(row, [], row.fraction) for row in report.by_class]
        tables.append(_by_class("By class in training (% of samples)", [], rows, names, notes, top))
    tables += [_probe(report.probe)] if report.probe else []
    return tables + ([mixture_table(report.mixtures)] if report.mixtures else [])


def survey_tables(measured: doc.Measured, *, top: int | None = 10, extremes: int | None = 3) -> dict[str, list[Sheet]]:
    """The sections that are there; `top` classes and `extremes` images at each end, None: all that there are."""
    names, by = [spot.name for spot in measured.spots], measured.difficulty
    answers = by.by_correctness if by else []
    where = [f"Top-1: on these {whole(measured.images)} {SPLITS[measured.split]}."]
    correctness = [[cell.name, *map(fraction, cell.mean), whole(cell.images)] for cell in answers]
    tables = {
        "spots": [_spots(measured)] if measured.spots or measured.value is None else [],
        "classes": [_classes(measured.classes, names, where, top)] if measured.classes else [],
        "difficulty": [
            _deciles("the student's loss", "Loss", by.by_student_loss, names, where),
            _deciles("the teacher's confidence", "Confidence", by.by_teacher_confidence, names, where),
            Sheet("By correctness (%)", ["Correctness", *map(named, names), "Images"], correctness),
        ]
        if by
        else [],
        "paths": [_paths(measured.paths, names, top)] if measured.paths else [],
        "extremes": [_extremes(ends, extremes) for ends in measured.extremes if extremes != 0 and ends.spread],
        "routed": [_routed(measured.routed)] if measured.routed else [],
    }
    alike = measured.value == "rate" and all(spot.p05 == spot.p95 == spot.mean for spot in measured.spots)
    kept = ("spots", "routed") if alike else tables
    return {section: sheets for section, sheets in tables.items() if sheets and section in kept}


def _probe(probe: doc.Probe) -> Sheet:
    columns = {"Spot": lambda spot: named(spot.name), "Helps %": lambda spot: fraction(spot.helps)}
    columns |= columns_of(lambda value: fixed(value, 2), {"Mean / std": "mean", "Reliability": "reliability"})
    columns |= columns_of(lambda value: fixed(value, 2), {"Explained": "explained", "Chosen loss": "chosen_loss"})
    columns |= {"Class share %": lambda spot: fraction(spot.class_share)}
    columns |= {"Settled": lambda spot: DASH if spot.settled is None else f"epoch {spot.settled}"}
    notes = [
        f"{whole(probe.images)} training images, {whole(probe.held_out)} {probe.held_out_split} images held out, seed "
        f"{probe.seed}. Helps: images whose distillation gradient would lower the held-out cross-entropy.",
        "Reliability: of that product for single images, by halves of the held-out images. Near 0 there is nothing to "
        "choose by. Explained: R² by embeddings and losses, which is all that a router sees.",
        "Chosen loss: mean loss of what the router chooses over that of all. Class share: of the variance of its "
        "decisions, what lies between classes.",
    ]
    return table("Is there anything to route?", probe.spots, columns, notes)


def mixture_table(record: Mixtures) -> Sheet:
    """A row per group: the weight of each of its blocks, from the first to the last."""
    columns = {
        "Stage": lambda group: named(group.name),
        "Blocks": lambda group: whole(len(group.alpha)),
        "Weight of each, in order": lambda group: " ".join(f"{fraction(value):>5}" for value in group.alpha),
        "Largest": lambda group: whole(group.largest),
        "Entropy": lambda group: fixed(group.entropy, 2),
    }
    source = f"{named(record.norm)} · weights: {named(record.weights)}"
    notes = [f"{named(record.teacher)} on {named(record.dataset)} · {source}"]
    notes.append("Largest: place of the block with the largest weight; entropy: of the weights, in nats.")
    notes += [
        f"{named(group.name)}: blocks {', '.join(map(str, group.positions))}; others differ in width"
        for group in record.groups
        if group.positions != list(range(1, len(group.positions) + 1))
    ]
    text = ("Stage", "Weight of each, in order")
    return table("Mixtures of the teacher's blocks (%)", record.groups, columns, notes, text)


def _nothing_varies(report: doc.SpotsDocument) -> bool:
    """Whether every epoch and class has the fractions of the whole run, and no router was trained."""
    rows = [
        *(row.fraction for row in report.by_epoch),
        *(row.fraction for row in report.by_class if row.peak is not None),
    ]
    trained = any(spot.probability is not None for spot in report.overall)
    return not trained and all(row == [spot.fraction for spot in report.overall] for row in rows)


def _overall(report: doc.SpotsDocument, alike: bool) -> Sheet:
    spots = report.overall
    with_policy = any(spot.probability is not None for spot in spots)
    measured = any(spot.gradient_ratio is not None for spot in spots)
    headers = ["Spot", "Kind", "Fraction", "", *["First", "Last", "Min", "Max"] * (not alike)]
    headers += [*["Probability"] * with_policy, *["Gradient ratio"] * measured]
    rows = [
        [named(spot.name), named(spot.kind), fraction(spot.fraction), bar(spot.fraction)]
        + [fraction(value) for value in (spot.first, spot.last, spot.min, spot.max) if not alike]
        + [fixed(spot.probability, 2)] * with_policy
        + [DASH if spot.gradient_ratio is None else f"{spot.gradient_ratio:.2g}"] * measured
        for spot in spots
    ]
    notes = [
        f"{named(report.teacher)} → {named(report.student)} on {named(report.dataset)} · "
        f"{named(report.method)} · {named(report.router)} router · {whole(report.epochs)} epoch"
        + "s" * (report.epochs != 1)
        + " so far" * (not report.finished),
        "Kind: feature maps, embeddings or logits are compared. Fraction: "
        + ("the same in every epoch" if alike else "over all epochs; first, last, min, max: of single epochs")
        + "; probability: mean teacher-routing probability in the last epoch." * with_policy
        + "." * (not with_policy),
    ]
    notes += _dose_notes(report) if measured else []
    if report.saturated:
        return Sheet(report.saturated, [], [], [notes[0], *notes[2:]])
    return Sheet("Samples distilled at each spot (%)", headers, rows, notes, text=2)


def _dose_notes(report: doc.SpotsDocument) -> list[str]:
    """What the gradient ratios are, and how to set a weight that is far off."""
    notes = [
        "Gradient ratio: the distillation loss's gradient at the student's feature over the task's; mean of epochs."
    ]
    if report.balance:
        share = f"{report.balance:g} over {len(report.overall) - 1 or 1}"
        return [f"{notes[0][:-1]}, before it was balanced to {share} at each feature spot."]
    for spot in report.overall:
        ratio = spot.gradient_ratio
        if ratio is not None and not WEAK <= ratio <= STRONG:
            of_logits = spot.kind == "logits" and len(report.overall) > 1
            key, cure = ("method.kl_weight", "") if of_logits else ("method.weight", "--loss-weight auto balances it, ")
            what = "hardly acts: its" if ratio < WEAK else "drowns the task: its"
            notes.append(
                f"Warning: the loss at {named(spot.name)} {what} gradient is {ratio:.2g} times the task's; "
                f"{cure}--set {key}=... sets it."
            )
    return notes


def _by_epoch(report: doc.SpotsDocument, most: int) -> Sheet:
    epochs = report.by_epoch
    shown = thinned(epochs, most)
    # A column of nothing but dashes says only that the router has no such thing.
    steps = [key for key in STEPS if any(getattr(row, key) is not None for row in epochs)]
    losses = any(row.routed_ce is not None for row in epochs)
    headers = ["Epoch", *(named(spot.name) for spot in report.overall), *(STEPS[key] for key in steps)]
    headers += ["No sample", *["CE routed", "CE student"] * losses]
    rows = [
        [whole(row.epoch), *map(fraction, row.fraction), *(fraction(getattr(row, key)) for key in steps)]
        + [fraction(max((value for value in row.empty_selection if value is not None), default=None))]
        + [fixed(value, 2) for value in (row.routed_ce, row.student_ce) if losses]
        for row in shown
    ]
    notes = [
        "Loss × γ, ÷ γ: steps at which the router's loss was multiplied or divided by the setting router.gamma; count "
        "penalty: at which too few samples were selected, and that was penalised."
    ] * bool(steps)
    several = len(report.overall) > 1
    notes.append("No sample: steps that selected none" + ", at the spot with the most" * several + ".")
    notes += ["CE routed, student: mean cross-entropy of the routed network and of the student."] * losses
    notes += left_out(len(shown), len(epochs), "epochs")
    return Sheet("By epoch (% of samples; right of the spots, % of steps)", headers, rows, notes, text=0)


def _by_class(
    title: str, more: list[str], rows: list[ClassRow], names: list[str], notes: list[str], top: int | None
) -> Sheet:
    """The classes that have images, from the highest peak; `more`: further columns."""
    ranked = sorted((one for one in rows if one[0].peak is not None), key=lambda one: -(one[0].peak or 0.0))
    lines = [
        [named(row.name)]
        # Six characters hold any deviation (−100.0), so that the means stand under each other.
        + [f"{fraction(mean)} {deviation(d, mean):>6}" for mean, d in zip(means, row.deviation, strict=True)]
        + more_cells
        for row, more_cells, means in ranked
    ]
    shown, marked = both_ends(lines, top)
    notes = [*notes, *left_out(len(shown) - marked, len(ranked), "classes")]
    return Sheet(title, ["Class", *map(named, names), *more], shown, notes, text=["Class"])


def _spots(measured: doc.Measured) -> Sheet:
    stages = {"Student": "student_stage", "Teacher": "teacher_stage"} if measured.source != "samples" else {}
    columns = columns_of(named, {"Spot": "name"} | stages)
    columns |= columns_of(fraction, {"Mean": "mean", "Sampled": "sampled", "> 50": "above_half"})
    columns["Entropy (bits)"] = lambda spot: fixed(spot.entropy, 2)
    columns |= columns_of(fraction, {"5 %": "p05", "50 %": "p50", "95 %": "p95"})
    of = f" of {named(measured.dataset)}" if measured.dataset else ""
    notes = [f"{whole(measured.images)} {SPLITS[measured.split]}{of}; sampled with seed {measured.seed}."]
    notes[0] += " > 50: images above 50 %; 5, 50, 95 %: quantiles over the images." * bool(measured.spots)
    title = f"The trained router ({WHAT[measured.value]})"
    return table(title, measured.spots, columns if measured.spots else {}, [*notes, *measured.notes], ("Spot", *stages))


def _classes(classes: doc.Classes, names: list[str], where: list[str], top: int | None) -> Sheet:
    known = [*classes.correlation_p, *[None] * len(names)]
    related = [(named(name), r, p) for name, r, p in zip(names, classes.correlation, known, strict=False)]
    text = ", ".join(f"{name} {DASH if r is None else f'{fixed(r, 2)} (p {p_value(p)})'}" for name, r, p in related)
    count = sum(row.images > 0 for row in classes.rows)
    notes = [f"Pearson's correlation of a class's mean with the student's top-1 on it, n = {count} classes: {text}."]
    notes += where
    rows: list[ClassRow] = [(row, [whole(row.images), fixed(row.student_top1, 1)], row.mean) for row in classes.rows]
    return _by_class("The trained router by class (%)", ["Images", "Student top-1 %"], rows, names, notes, top)


def _deciles(of: str, measure: str, deciles: list[doc.Decile], names: list[str], notes: list[str]) -> Sheet:
    rows = []
    for row in deciles:
        top1 = [fixed(value, 1) for value in (row.student_top1, row.teacher_top1)]
        rows.append([fixed(row.from_, 3), fixed(row.to, 3), *map(fraction, row.mean), whole(row.images), *top1])
    headers = [f"{measure} from", "to", *map(named, names), *DECILE]
    return Sheet(f"By difficulty: {of} (%)", headers, rows, notes, text=0)


def _paths(paths: list[doc.RoutingPath], names: list[str], top: int | None) -> Sheet:
    shown = paths if top is None else paths[:PATHS]
    columns = columns_of(str, {"Path": "path"}) | columns_of(fraction, {"Fraction": "fraction"})
    columns[""] = lambda row: bar(row.fraction)
    notes = [f"{LETTERS} ({', '.join(map(named, names))}). Fraction: mean probability."]
    return table("Paths (%)", shown, columns, [*notes, *left_out(len(shown), len(paths), "paths")])


def _extremes(ends: doc.SpotExtremes, most: int | None) -> Sheet:
    columns = columns_of(fraction, {"Value": "value"}) | columns_of(str, {"Image": "index"})
    images: list[doc.ExtremeImage] = [*ends.highest[:most], *reversed(ends.lowest[:most])]
    columns |= columns_of(named, {"File": "file"} if any(image.file for image in images) else {})
    text = {"Class": "label", "Student predicts": "student_prediction", "Teacher predicts": "teacher_prediction"}
    columns |= columns_of(named, text if any(image.label for image in images) else {})
    columns["Student loss"] = lambda row: fixed(row.student_loss, 2)
    columns |= columns_of(fraction, {"Teacher confidence": "teacher_confidence"})
    notes = ["Highest first, then lowest. Image: its index in the data set; student loss in nats."]
    return table(f"Extremes at {named(ends.spot)} (%)", images, columns, notes, ["File", *text])


def _routed(routed: doc.RoutedNetwork) -> Sheet:
    scores = [(NETWORKS[key], score) for key, score in routed if isinstance(score, doc.Score)]
    rows = [[name, fixed(score.top1, 2), fixed(score.loss, 3)] for name, score in scores]
    notes = [f"All on {whole(routed.images)} test images, not on those of the tables by class and by difficulty."]
    if sampled := routed.sampled:
        std = fixed(sampled.top1_std, 2)
        notes.append(f"Sampled gates: mean of {sampled.draws} draws, standard deviation of top-1 {std}.")
        if sampled.top1 < min(routed.student.top1, routed.teacher.top1):
            notes.append(
                "Sampled gates are below both networks: where a path changes from one network to the other, only the "
                "adapter was trained for it, and neither network for the other's features. It exists to train "
                "the router; what is used afterwards is the student."
            )
    return Sheet("The routed network", ("Network", "Top-1 %", "Loss"), rows, notes)
