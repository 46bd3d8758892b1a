"""Score a saved network on the test images."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sakd_cli.config.layers import Layer, resolve
from sakd_cli.config.run import Runtime
from sakd_cli.data.dataset import Dataset
from sakd_cli.data.loader import EvalLoader
from sakd_cli.engine.evaluate import Scores, evaluate
from sakd_cli.engine.runtime import effective, pick_device
from sakd_cli.engine.watch import Watcher
from sakd_cli.models import artifact
from sakd_cli.models.cost import cost
from sakd_cli.models.staged import StagedModel
from sakd_cli.rundir import RunDir
from sakd_cli.tasks.build import check_classes, load_images
from sakd_cli.tasks.sftn import branch_rows, branches_of


def score(weights: Path, run: RunDir | None, layers: Iterable[Layer], watcher: Watcher) -> dict[str, Any]:
    """Figures of the network in `weights` (file or folder); the layers say which data and device.

    run   the run that the weights come from, if any; weights of none are scored on the data set of their header.
    Raises UsageError on other classes.
    """
    network = artifact.load(weights)
    named = Layer("the weights' header", {"data": network.card.dataset})
    config = resolve("eval", [named, *layers]).config
    device = pick_device(config.device)
    images = load_images(config.data.model_copy(update={"holdout": 0.0}))
    check_classes(network, images, str(weights))
    branches = branches_of(weights, network)
    model = effective(Runtime(), device).laid_out(network.model.to(device))
    dataset = images.dataset
    unfinished = " of a run that is not finished" if run and not run.finished else ""
    scores = test_scores(model, dataset, device, watcher, f"scoring {weights}{unfinished}")
    rows = branch_rows(model, branches.to(device), EvalLoader(dataset.test, dataset, device=device)) if branches else []
    named_by = {"weights": str(weights), "sha256": network.sha256, "network": model.name, "dataset": dataset.name}
    costs = cost(model, images.side)._asdict() | {"device": str(device)}
    return described(named_by, run, scores, costs, dataset.classes) | ({"branches": rows} if rows else {})


def described(
    named: dict[str, Any], run: RunDir | None, scores: Scores, costs: dict[str, Any], classes: Sequence[str]
) -> dict[str, Any]:
    """The document of `sakd eval --json`. named: weights, sha256, network, dataset; costs: parameters, macs, device."""
    per_class = zip(classes, scores.images_of_class, scores.top1_of_class, strict=True)
    return {
        "schema": "sakd.eval/1",
        "run": str(run.path) if run else None,
        "finished": run.finished if run else None,
        **named,
        "split": "test",
        "images": scores.images,
        **scores.headline(),
        **costs,
        "classes": [{"name": name, "images": count, "top1": top1} for name, count, top1 in per_class],
    }


def test_scores(model: StagedModel, dataset: Dataset, device: torch.device, watcher: Watcher, title: str) -> Scores:
    """Figures of a network that is on `device`, on all test images."""
    batches = EvalLoader(dataset.test, dataset, device=device)
    return evaluate(model, followed(batches, watcher, title), len(dataset.classes))


def followed(batches: EvalLoader, watcher: Watcher, title: str) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches, with the watcher told of each."""
    watcher.begin(title, len(batches))
    try:
        for step, batch in enumerate(batches, start=1):
            yield batch
            watcher.advance(step)
    finally:
        watcher.end()
