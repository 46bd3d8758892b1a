"""Bring in weights that another program has trained: read, fill one of our networks, score it, write the folder."""

from pathlib import Path
from typing import Any

from sakd_cli.config.networks import find_network
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.table import describe
from sakd_cli.documents.table import Imported, WeightsFile
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.runtime import pick_device
from sakd_cli.errors import DataError, UsageError
from sakd_cli.files import sha256, whole_folder
from sakd_cli.models import artifact, foreign
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.runs.build import load_images
from sakd_cli.runs.evaluate import test_scores


def import_weights(file: Path, model: str, config: EvalConfig, out: Path | None, reporter: Reporter) -> Imported:
    """Write the deployable folder `out` (None: `<network>-<data set>` here) from a foreign weights file.

    The network is scored where the data set's files are at hand; nothing is downloaded for it. Raises UsageError where
    the file is not this network's weights or `out` exists, NonFiniteError where a weight is no number.
    """
    name = find_network(model).name
    device = pick_device(config.device)
    known = describe(config.data)
    folder = out or Path(f"{name.replace('/', '.')}-{known.name}")
    if folder.exists() or folder.is_symlink():
        raise UsageError(f"{folder}: exists already and is not overwritten", hint="--out DIR")
    network = foreign.load_foreign(file, name, len(known.classes), known.train.side)
    metrics: dict[str, Any] = {}
    try:
        known = load_images(config.data.model_copy(update={"validation": 0.0, "download": False})).dataset
        scores = test_scores(network.to(device), known, device, reporter, f"scoring {file}")
        metrics = scores.metrics() | {"split": "test", "images": scores.images}
    except DataError as error:
        reporter.warn(f"not scored: {error.message}")
    document = Imported(
        folder=str(folder),
        network=name,
        dataset=known.name,
        classes=len(known.classes),
        imported=WeightsFile(file=file.name, sha256=sha256(file)),
        **metrics,
    )
    card = NetworkCard(name, known.name, known.classes, known.mean, known.std, known.train.side, known.seen)
    facts = document.model_dump(include={"top1", "top5", "loss", "images", "split", "imported"})
    with whole_folder(folder) as aside:
        artifact.save_folder(aside, network.cpu(), card, facts)
    return document
