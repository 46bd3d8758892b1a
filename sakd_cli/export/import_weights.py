"""Bring in weights that another program has trained: read, fill one of our networks, score it, write the folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sakd_cli.config.networks import RELEASES, Release, find_network
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.loader import EvalLoader
from sakd_cli.data.table import describe
from sakd_cli.documents.table import Imported, WeightsFile
from sakd_cli.engine.evaluate import evaluate
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.runtime import pick_device
from sakd_cli.errors import DataError, UsageError, unreadable
from sakd_cli.files import MOST_YAML, parse_json, read_bytes, sha256
from sakd_cli.models import artifact, foreign
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.runs.evaluate import followed
from sakd_cli.runs.images import load_images
from sakd_cli.runs.initial_weights import differing_classes
from sakd_cli.runs.teachers import GAP, warn_of_chance
from sakd_cli.writing import whole_folder


def import_weights(
    file: Path, params: Mapping[str, Any], layers: Sequence[ConfigSource], reporter: Reporter
) -> Imported:
    """Write the deployable folder that the params name (or `<network>-<data set>` here) from a foreign weights file.

    params  the options of `sakd import-weights`; without a network it is known by the names of file and folder
    The network is scored where the data set's files are at hand; nothing is downloaded for it. Raises UsageError where
    the file is not this network's weights or `out` exists, NonFiniteError where a weight is no number.
    """
    name, title, release = _named(file, params["network"])
    below = [ConfigSource("the published teacher", {"data": {"name": release.dataset}})] if release else []
    config: EvalConfig = resolve("eval", [*below, *layers]).config
    device = pick_device(config.device)
    known = describe(config.data)
    folder = params["import_dir"] or Path(f"{name.replace('/', '.')}-{known.name}")
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder}: exists already and is not overwritten", hint="--out DIR")
    classes = params["class_order"]
    order = None if classes is None else _order(classes, known.classes, known.name)
    about: dict[str, Any] = {"key": params["key"], "order": order, "tell": reporter.say}
    network = foreign.load_foreign(file, name, len(known.classes), known.train.side, **about)
    metrics: dict[str, Any] = {}
    try:
        known = load_images(config.data.model_copy(update={"validation": 0.0, "download": False})).dataset
        batches = followed(EvalLoader(known.test, known, device=device), reporter, f"scoring {file}")
        scores = evaluate(network.to(device), batches, len(known.classes))
        metrics = scores.metrics() | {"split": "test", "images": scores.images}
        warn_of_chance(scores.top1, scores.images, len(known.classes), reporter.warn)
    except DataError as error:
        reporter.warn(f"not scored: {error.message}")
    published = release if release and release.dataset == known.name else None
    if published and metrics and abs(metrics["top1"] - published.top1) > GAP:
        reporter.warn(
            f"{title} is published with top-1 {published.top1:.2f} % ({published.source}); "
            f"here {metrics['top1']:.2f} % on {metrics['images']} test images"
        )
    document = Imported(
        folder=str(folder),
        network=name,
        dataset=known.name,
        classes=len(known.classes),
        imported=WeightsFile(
            file=file.name,
            sha256=sha256(file),
            release=title if published else None,
            published_top1=published.top1 if published else None,
        ),
        **metrics,
    )
    facts = document.model_dump(include={"top1", "top5", "loss", "images", "split", "imported"})
    with whole_folder(folder) as aside:
        artifact.save_folder(aside, network.cpu(), NetworkCard.of(name, known), facts)
    return document


def _named(file: Path, model: str | None) -> tuple[str, str, Release | None]:
    """Name of the network, of the published teacher, and what is known of it, where the names say that it is one."""
    titles = [model or "", file.absolute().parent.name, file.stem.partition("-")[0]]
    title = next((title for title in titles if title in RELEASES), "")
    release = RELEASES.get(title)
    if model is None or model in RELEASES:
        if release is None:
            hint = f"the names of {file.name} and its folder do not say"
            raise UsageError("Missing option '--model': whose weights are these?", hint)
        model = release.network
    name = find_network(model).name
    return name, title, release if release and release.network == name else None


def _order(file: Path, ours: tuple[str, ...], dataset: str) -> list[int]:
    """For every class of ours its place in a file of class names. Raises UsageError where these are other classes.

    The file has one name a line, or is JSON: a list, {"0": name, ...} or {name: 0, ...}.
    """
    try:
        text = read_bytes(file, MOST_YAML * 8).decode("utf-8-sig")
        content: Any = parse_json(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
        if isinstance(content, dict):
            pairs = [(name, place) if isinstance(place, int) else (place, int(name)) for name, place in content.items()]
            if sorted(place for _, place in pairs) not in [list(range(at, at + len(pairs))) for at in (0, 1)]:
                raise ValueError
            content = [name for name, _ in sorted(pairs, key=lambda pair: pair[1])]
        theirs = tuple(str(name).strip() for name in content if str(name).strip())
    except OSError as error:
        raise UsageError(f"--classes {file}: {unreadable(error)}") from None
    except (ValueError, TypeError):
        raise UsageError(
            f"--classes {file}: holds no order of classes", "a name a line, or JSON: a list, or places"
        ) from None
    if sorted(theirs) != sorted(ours):
        found = differing_classes(theirs, ours)
        raise UsageError(f"--classes {file}: is not the {len(ours)} classes of {dataset}: {found}")
    return [theirs.index(name) for name in ours]
