"""Networks that torchvision, timm or the Hugging Face hub has trained: each a folder like ours, in the cache."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.config.networks import find_network
from sakd_cli.config.preprocessing import Preprocessing, library_preprocessing
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.data.published import default_root
from sakd_cli.data.table import describe
from sakd_cli.errors import DataError, UsageError
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.external import library_classes
from sakd_cli.models.table import create
from sakd_cli.runs.initial_weights import foreign_tensors
from sakd_cli.writing import whole_folder

IMAGENET = {"data": {"name": "imagenet"}}  # what nearly all of them were trained on


def network_by_name(name: str, layers: Sequence[ConfigSource]) -> Path:
    """The folder of a library's trained network, for the data set that the settings name, else for ImageNet.

    Raises UsageError where there is no such network, or it has other classes.
    """
    said = any(one.values.get("data") for one in layers)
    config = resolve("eval", [ConfigSource("the library's network", IMAGENET), *layers]).config
    try:
        return trained_by_library(name, config.data)
    except DataError:
        if said:
            raise
        return trained_by_library(name, None)


def trained_by_library(name: str, data: DataConfig | None) -> Path:
    """The folder of a network with its library's weights, for a data set; None: for the classes that the library names.

    Its pictures are shown as the library says. Where the library names its classes, and they are those of the data set
    in another order, the rows of its head are put into that order; else their order is taken to be the same. Raises
    UsageError where it has no weights or other classes, DataError where the data set is not at hand.
    """
    network = find_network(name)
    entry = str(network.arguments["entry"])
    said = library_preprocessing(f"{network.family}/{entry}")
    theirs = library_classes(entry, network.family)
    if data is None:
        if theirs is None:
            theirs = library_classes("resnet18", "torchvision")  # ImageNet's, whose order all share
        ours, dataset, files = theirs or (), "imagenet", True
    else:
        known = describe(data)
        ours, dataset, files = known.classes, known.name, isinstance(data, FilesConfig)
    fields = {key: value for key, value in said.items() if key in Preprocessing.model_fields}
    seen = Preprocessing(**fields) if files else None
    side = seen.size if seen else known.train.side
    mean, std = (tuple(map(float, said[key])) for key in ("mean", "std"))
    card = NetworkCard(network.name, dataset, tuple(ours), mean, std, side, seen)
    version = importlib.metadata.version(network.family)
    key = hashlib.sha256(f"{version} {card}".encode()).hexdigest()[:16]
    folder = default_root().parent / "networks" / f"{network.name.replace('/', '.').replace(':', '.')}-{key}"
    if not (folder / "config.json").is_file():
        _write(folder, card, theirs)
    return folder


def _write(folder: Path, card: NetworkCard, theirs: tuple[str, ...] | None) -> None:
    network = find_network(card.architecture)
    model = create(network.name, len(card.classes), card.side)
    mine = model.state_dict()
    tensors, _ = foreign_tensors(model, None, "teacher")
    if (count := len(tensors["head.weight"])) != len(card.classes):
        text = f"{network.name}: its library's weights are for {count} classes, not for the {len(card.classes)} of "
        hint = f"sakd pretrain-teacher {network.name} --set init_from=library --head replace trains it for them"
        raise UsageError(text + card.dataset, hint)
    if theirs is not None and theirs != card.classes and sorted(theirs) == sorted(card.classes):
        order = [theirs.index(name) for name in card.classes]
        tensors |= {name: tensor[order] for name, tensor in tensors.items() if name.startswith("head.")}
    if odd := [name for name, tensor in tensors.items() if tensor.shape != mine[name].shape]:
        raise UsageError(f"{network.name}: its weights are for other images than {card.side} pixels ({odd[0]})")
    model.load_state_dict({name: tensor.to(mine[name].dtype) for name, tensor in tensors.items()})
    with whole_folder(folder) as aside:
        artifact.save_folder(aside, model, card, {"imported": {"file": network.name, "library": network.family}})
