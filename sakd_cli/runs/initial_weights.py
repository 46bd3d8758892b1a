"""What a training starts from: weights of sakd, of another program or a library's own; what becomes of their head.

And networks that torchvision, timm or the Hugging Face hub has trained: each a folder like ours, in the cache.
"""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sakd_cli.config.datasets import DataConfig, FilesConfig
from sakd_cli.config.networks import brought, find_network
from sakd_cli.config.preprocessing import Preprocessing, library_preprocessing
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.training import DistillConfig, EvalConfig
from sakd_cli.data.dataset import Dataset
from sakd_cli.data.published import default_root
from sakd_cli.data.table import describe
from sakd_cli.errors import DataError, UsageError
from sakd_cli.files import sha256
from sakd_cli.models import artifact, foreign, plain_files
from sakd_cli.models.artifact import Artifact, NetworkCard
from sakd_cli.models.external import library_classes, library_weights
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.runs.locate import weights_at
from sakd_cli.runs.teacher_outputs import artifact_of
from sakd_cli.writing import whole_folder

Head = Literal["keep", "replace"]
IMAGENET = {"data": {"name": "imagenet"}}  # what nearly all of them were trained on


def load_initial_weights(
    network: StagedModel, source: Path | str | None, head: Head, dataset: Dataset, key: str
) -> tuple[str, ...]:
    """Put the weights of `source` into a fresh network; None: leave it fresh. `key`: the setting, for errors.

    Returns what is worth telling of the file.

    source  a run directory, a file of sakd, a file under the names of torchvision or timm, or `library`
    head    replace: the last layer stays fresh; keep: it comes too, and must be for the classes of the data set

    Raises UsageError where the weights are another network's or for other classes.
    """
    if source is None:
        return ()
    notes: tuple[str, ...] = ()
    path = None if source == "library" else weights_at(source, key)
    if path is None or not artifact.is_ours(path):
        tensors, notes = foreign_tensors(network, path, key)
    else:
        saved = artifact.load(path)
        if head == "keep":
            check_classes(saved, dataset, str(source), "--head replace gives it a new last layer")
        if saved.model.name != network.name:
            raise UsageError(f"{key}: {source} is a {saved.model.name}, not a {network.name}")
        tensors = saved.model.state_dict()
    mine = network.state_dict()
    last = {name for name in mine if name.startswith("head.")}
    if head == "replace":
        tensors = {name: tensor for name, tensor in tensors.items() if name not in last} | {n: mine[n] for n in last}
    elif tensors["head.weight"].shape != mine["head.weight"].shape:
        theirs, ours = len(tensors["head.weight"]), network.num_classes
        raise UsageError(
            f"{key}: {source} is for {theirs} classes, not for the {ours} of {dataset.name}",
            hint="--head replace gives it a new last layer",
        )
    for name, tensor in mine.items():
        if name not in tensors or tensors[name].shape != tensor.shape:
            raise UsageError(f"{key}: {source} does not fit {network.name} ({name[:60]})")
    network.load_state_dict({name: tensors[name] for name in mine})
    return notes


def load_teacher(config: DistillConfig | EvalConfig, path: Path) -> Artifact:
    """The teacher in a file or folder; also one of torchvision or timm, named by `teacher.source`, in a file of theirs.

    Raises UsageError where it is none.
    """
    assert config.teacher is not None
    if config.teacher.logits is not None:
        return artifact_of(path, describe(config.data))
    if brought(config.teacher.source) is None or not path.is_file() or artifact.is_ours(path):
        return artifact.load(path)
    known, name = describe(config.data), config.teacher.source
    notes: list[str] = []
    model = foreign.load_foreign(path, name, len(known.classes), known.train.side, tell=notes.append)
    return Artifact(model, NetworkCard.of(name, known), sha256(path), tuple(f"{path.name}: {note}" for note in notes))


def check_classes(network: Artifact, dataset: Dataset, source: str, hint: str | None = None) -> None:
    """Raise UsageError where a network's classes are not those of the data set."""
    theirs, ours = network.card.classes, dataset.classes
    if theirs != ours:
        raise UsageError(
            f"{source}: was trained for the {len(theirs)} classes of {network.card.dataset}, "
            f"not for the {len(ours)} of {dataset.name}: {differing_classes(theirs, ours)}",
            hint,
        )


def differing_classes(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The first classes in which two lists differ, counted from 0: `class 3 is 'cat' there and 'dog' here`."""
    if set(theirs) == set(ours) and len(theirs) == len(ours):
        place = next(n for n, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other)
        return f"another order, class {place} is {theirs[place][:40]!r} there and {ours[place][:40]!r} here"
    known, wanted = set(theirs), set(ours)
    parts = [[name for name in theirs if name not in wanted], [name for name in ours if name not in known]]
    words = [", ".join(repr(name[:40]) for name in names[:2]) + ", ..." * (len(names) > 2) for names in parts]
    return "; ".join(f"only {where}: {text}" for where, text in zip(("there", "here"), words, strict=True) if text)


def foreign_tensors(network: StagedModel, path: Path | None, key: str) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under our names, from a file of another program or (None) from the library the network is of; notes."""
    known = find_network(network.name)
    if brought(network.name) is None or (path is None and known.family == "factory"):
        raise UsageError(
            f"{key}: {path or 'library'} is not a file of sakd, and {network.name} is no network of a library",
            hint=artifact.IMPORT,
        )
    names, file, mine = network.plain_names(), path or Path("library"), network.state_dict()
    if path is None:
        content: Any = library_weights(network.name, known.arguments["entry"], known.family)
    else:
        content = plain_files.read_foreign(path, plain_files.ROOM + 16 * sum(tensor.nbytes for tensor in mine.values()))
    shapes = {name: tuple(tensor.shape) for name, tensor in mine.items()}
    found, said = foreign.find_weights(file, content, network.name, [names], shapes, set(names.values()))
    artifact.check_finite(file, found.tensors)
    zero = torch.zeros((), dtype=torch.int64)
    notes = tuple(f"{file.name}: {note}" for note in said)
    return {name: found.tensors.get(plain, zero) for name, plain in names.items()}, notes


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
