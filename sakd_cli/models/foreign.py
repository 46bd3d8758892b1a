"""Weights of other programs, tensor by tensor into one of our networks.

They are looked for by the names of their tensors (`models/dialects.py`), wherever in the file they stand and whatever
wrapper is in front of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sakd_cli.config.networks import NETWORKS, brought, find_network
from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.errors import UsageError
from sakd_cli.models.artifact import check_finite, fill_weights, meta_network, shapes_of
from sakd_cli.models.dialects import tables
from sakd_cli.models.plain_files import ALONE, ROOM, read_foreign
from sakd_cli.models.staged import StagedModel

COUNTER = "num_batches_tracked"  # PyTorch before 0.4.1 had none, and no result depends on it
WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})  # parts of names
EMA = re.compile(r"(^|[^a-z])ema|ema($|[^a-z])|averaged|(^|[^a-z])swa")  # in a lower-case place: an average of weights
DEEPEST, WIDEST = 5, 8  # dicts in dicts; entries of a list that may hold a state dict
Shapes = Mapping[str, tuple[int, ...]]


class Place(NamedTuple):
    """Where in a file a network may stand.

    label    keys from the top of the file and what its names begin with: `state_dict`, `model.module.student`
    path     the keys alone
    names    our name -> theirs, without what they begin with
    tensors  by their names; also what is no tensor
    beside   other parts of the same dict and their numbers of entries
    head     where the last layer stands, if not behind the others
    """

    label: str
    path: tuple[str, ...]
    names: dict[str, str]
    tensors: dict[str, Any]
    beside: Counter[str]
    head: str = ""

    @property
    def missing(self) -> list[str]:
        return [name for name in self.names.values() if name not in self.tensors and not name.endswith(COUNTER)]

    @property
    def left(self) -> list[str]:
        return sorted(self.tensors.keys() - set(self.names.values()))

    @property
    def averaged(self) -> bool:
        return bool(EMA.search(self.label.lower())) or "n_averaged" in self.beside  # torch's AveragedModel counts

    def unlike(self, shapes: Shapes) -> int:
        """Number of tensors of another shape; of the head's, whatever the number of classes."""
        odd = 0
        for ours, theirs in self.names.items():
            cut = int(ours.startswith("head."))
            odd += tuple(getattr(self.tensors.get(theirs), "shape", shapes[ours]))[cut:] != shapes[ours][cut:]
        return odd


def load_foreign(
    file: Path,
    architecture: str,
    classes: int,
    side: ImageSize = 32,
    *,
    key: str | None = None,
    order: Sequence[int] | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> StagedModel:
    """One of our networks with the weights of a foreign file, every tensor filled exactly once.

    A network of another library takes its tensors under that library's names; an auxiliary classifier is left out.

    key    where the weights stand, of several that fit: `state_dict_ema`, `module.student`
    order  for every class of ours the row of their head; None: theirs are in our order
    tell   is given what is worth knowing: which weights were taken, and what was left

    Raises UsageError where it is no file of plain tensors, or not of this network; NonFiniteError where a weight is no
    number.
    """
    network = meta_network(architecture, classes, side)
    ours = shapes_of(network)
    plain = network.plain_names()
    kinds = {plain[name]: tensor.dtype for name, tensor in network.state_dict().items()}
    known = brought(architecture) is not None
    ways = [plain] if known else tables(find_network(architecture).family, ours)
    content = read_foreign(file, ROOM + 8 * sum(4 * torch.Size(shape).numel() for shape in ours.values()))
    integers = {name for name, kind in kinds.items() if known and not kind.is_floating_point}
    found, notes = find_weights(file, content, architecture, ways, ours, integers, key)
    names, theirs = found.names, found.tensors
    tensors = {}
    for name, shape in ours.items():
        tensor = theirs.get(names[name], torch.zeros(()))  # a missing counter
        there = tuple(tensor.shape)
        if there != shape:
            reason = f"{names[name]} has shape {_cross(there)}, {architecture} needs {_cross(shape)}"
            if name.startswith("head.") and there[1:] == shape[1:]:
                reason = f"is for {there[0]} classes, not for {classes}"
            raise UsageError(f"{file}: {reason}", hint=_advice(theirs))
        kind = kinds[names[name]] if names[name] in integers else torch.float32
        tensor = tensor.to(torch.int64 if name.endswith(COUNTER) else kind)
        tensors[name] = tensor[list(order)] if order is not None and name.startswith("head.") else tensor
    check_finite(file, {names[name]: tensor for name, tensor in tensors.items()})
    if others := {str(one.dtype)[6:] for one in theirs.values() if one.is_floating_point()} - {"float32"}:
        tell(f"weights of type {', '.join(sorted(others))}, from here on float32")
    for note in notes:
        tell(note)
    return fill_weights(network, tensors)


def find_weights(
    file: Path,
    content: Any,
    architecture: str,
    ways: Sequence[dict[str, str]],
    shapes: Shapes,
    integers: Collection[str] = (),
    key: str | None = None,
) -> tuple[Place, tuple[str, ...]]:
    """Where in a file all tensors of a network are, under one of the tables of names `ways`; what is worth telling.

    shapes    of ours
    integers  their names of those that need not be floating-point numbers

    Raw weights are taken before averaged ones (EMA). Raises UsageError where none fits, several do and none was asked
    for by `key`, or a tensor is not plain.
    """
    auxiliary = brought(architecture) is not None
    inside = content if isinstance(content, dict | list | tuple) else ()
    width = tuple(shapes["head.weight"][1:])
    places = [one for path, part in _dicts(inside, (), set()) for one in _places(path, part, ways, auxiliary, width)]
    if not places:
        raise UsageError(f"{file}: holds no state dict of tensors with names", hint=ALONE)
    if key is not None:
        if not (asked := [place for place in places if f".{key}." in f".{place.label}."]):
            there = dict.fromkeys(place.label for place in places if not place.missing) or {places[0].label: None}
            labels = ", ".join(filter(None, there))
            hint = f"there are: {labels}" if labels else "its weights stand under no key: leave --key out"
            raise UsageError(f"{file}: has no weights under {key!r}", hint)
        places = asked
    if not (fits := [place for place in places if not (place.missing or place.left)]):
        nearest = min(places, key=lambda place: len(place.missing) + len(place.left))
        _check_plain(file, nearest, integers)
        parts = [(nearest.missing, "missing"), (nearest.left, "left over")]
        both = "; ".join(f"{len(part)} tensors {what}: {_few(part)}" for part, what in parts if part)
        few = not 5 <= len(nearest.missing) + len(nearest.left) < 5000
        raise UsageError(f"{file}: is no {architecture}; {both}", None if few else _advice(nearest.tensors))
    alike = min(place.unlike(shapes) for place in fits)
    fits = [place for place in fits if place.unlike(shapes) == alike]
    raw, averaged = ([place for place in fits if place.averaged is kind] for kind in (False, True))
    if len(raw or averaged) > 1:
        labels = ", ".join(place.label or "the names without a prefix" for place in raw or averaged)
        hint = f"say which: sakd import-weights {file} --model {architecture} --key {(raw or averaged)[-1].label}"
        raise UsageError(f"{file}: holds {len(raw or averaged)} networks that fit: {labels}", hint)
    (chosen,) = raw or averaged
    _check_plain(file, chosen, integers)
    return chosen, tuple(_notes(content, chosen, averaged if raw else []))


def _dicts(content: Any, path: tuple[str, ...], seen: set[int]) -> Iterator[tuple[tuple[str, ...], dict[Any, Any]]]:
    """Every dict in the content that has tensors under names, with the keys that lead there; each once."""
    seen.add(id(content))
    parts: list[tuple[Any, Any]] = list(content.items() if isinstance(content, dict) else enumerate(content))
    if isinstance(content, dict) and any(isinstance(one, Tensor) and isinstance(name, str) for name, one in parts):
        yield path, content
    if len(path) < DEEPEST and (isinstance(content, dict) or len(parts) <= WIDEST):
        for name, part in parts:
            if isinstance(part, dict | list | tuple) and id(part) not in seen:
                yield from _dicts(part, (*path, str(name)), seen)


def _places(
    path: tuple[str, ...], part: dict[Any, Any], ways: Sequence[dict[str, str]], auxiliary: bool, width: tuple[int, ...]
) -> Iterator[Place]:
    """Where in a dict a network of these names may stand: behind what stands in front of its first or last tensor."""
    if not all(isinstance(name, str) for name in part):
        return
    wrappers = WRAPPERS - {word for names in ways for name in names.values() for word in name.split(".")}
    bare: dict[str, str] = {}
    for name in part:
        short = ".".join(word for word in name.split(".") if word not in wrappers)
        bare[name if short in bare else short] = name  # there twice: what is meant is not known, and one is left over
    for names in ways:
        counted = [name for name in names.values() if not name.endswith(COUNTER)]
        ends = [(short, end) for short in bare for end in (counted[0], counted[-1]) if f".{short}".endswith(f".{end}")]
        for front in dict.fromkeys(["", *(short.removesuffix(end) for short, end in ends)]):
            inside = {short.removeprefix(front): name for short, name in bare.items() if short.startswith(front)}
            if front and len(inside) < len(counted) // 2:
                continue
            needed, depth = set(names.values()), front.count(".")
            head, apart = _head_apart(bare, part, names, front, width)
            inside = {short: name for short, name in inside.items() if name not in apart.values()} | apart
            aside = {name for short, name in inside.items() if short not in needed and _beside(short, part[name])}
            aside |= {name for short, name in inside.items() if auxiliary and short.lower().startswith("aux")}
            tensors = {short: part[name] for short, name in inside.items() if name not in aside}
            others = (part.keys() - inside.values()) | aside
            beside = Counter(_start(name, max(depth, 1), wrappers) for name in part if name in others)
            own = _start(next(iter(inside.values()), ""), depth, wrappers)
            yield Place(".".join(filter(None, (*path, own))), path, names, tensors, beside, head)


def _head_apart(
    bare: Mapping[str, str], part: Mapping[str, Any], names: Mapping[str, str], front: str, width: tuple[int, ...]
) -> tuple[str, dict[str, str]]:
    """Where the last layer stands of a network that has it not behind `front`, and its tensors by the network's names.

    It is the one part of the dict that is such a layer and nothing else; empty where there is none, or several.
    """
    ends = {theirs: ours.removeprefix("head.") for ours, theirs in names.items() if ours.startswith("head.")}
    words, groups = {f"{front}{name}".partition(".")[0] for name in names.values()}, dict[str, set[str]]()
    for short in bare:
        if (word := short.partition(".")[0]) not in words:
            groups.setdefault(word, set()).add(short)
    found = []
    for group in groups.values():
        head = min(group).rpartition(".")[0]
        weight = part[bare[max(group)]]  # behind `bias`
        if group == {f"{head}.{end}" for end in ends.values()} and isinstance(weight, Tensor):
            found += [head] * (tuple(weight.shape[1:]) == width)
    if any(f"{front}{name}" in bare for name in ends) or len(found) != 1:
        return "", {}
    return found[0], {theirs: bare[f"{found[0]}.{end}"] for theirs, end in ends.items()}


def _beside(name: str, value: Any) -> bool:
    """Whether an entry of a state dict is plainly no weight: no tensor, or a number with a name of its own."""
    return not isinstance(value, Tensor) or (value.ndim == 0 and "." not in name)


def _start(name: str, depth: int, wrappers: Collection[str]) -> str:
    """The first words of a tensor's name, so many that are no wrapper's."""
    words = name.split(".")
    counts = list(accumulate(int(word not in wrappers) for word in words))
    return ".".join(words[: counts.index(depth) + 1]) if depth in counts and depth else ""


def _notes(content: Any, chosen: Place, averaged: Sequence[Place]) -> Iterator[str]:
    """What is worth knowing of a file: which of several weights were taken, and what else there is."""
    if averaged:
        where = chosen.label or "what has no prefix"
        yield f"raw weights taken ({where}); averaged ones (EMA) are there too: --key {averaged[0].label}"
    elif chosen.averaged:
        yield f"averaged weights (EMA) taken ({chosen.label or 'what has no prefix'})"
    if chosen.head:
        yield f"the last layer taken from {chosen.head}"
    others: list[str] = []
    for depth, key in enumerate(chosen.path):
        entries = content if isinstance(content, dict) else dict(enumerate(content))
        others += [".".join((*chosen.path[:depth], str(name))) for name in entries if str(name) != key]
        content = next(value for name, value in entries.items() if str(name) == key)
    others += [name if count == 1 else f"{name} ({count} entries)" for name, count in chosen.beside.items()]
    if others:
        yield f"left in the file, beside the weights: {_few(others, 12)}"


def _check_plain(file: Path, place: Place, integers: Collection[str]) -> None:
    """Raise UsageError where an entry of a state dict is no plain tensor of numbers."""
    for name, value in place.tensors.items():
        if not isinstance(value, Tensor):
            raise UsageError(f"{file}: {name[:40]!r} in its state dict is no tensor", hint=ALONE)
        counts = name in integers or name.endswith(COUNTER)
        kind = torch.is_floating_point(value) or (counts and not value.is_complex())
        if value.layout != torch.strided or value.device.type != "cpu" or value.is_quantized or not kind:
            raise UsageError(f"{file}: {name[:40]!r} is no plain tensor of floating-point numbers")


def _advice(theirs: dict[str, Any]) -> str | None:
    """Which of our networks the tensors would fit, whatever the number of classes."""
    there = {name: tuple(one.shape) for name, one in theirs.items() if isinstance(one, Tensor)}
    there = {name: shape for name, shape in there.items() if not name.endswith(COUNTER)}
    for network in NETWORKS.values():
        if not any(way["head.weight"] in theirs for way in tables(network.family, ["head.weight"])):
            continue
        every = shapes_of(meta_network(network.name, 1, 32))
        ours = {name: shape for name, shape in every.items() if not name.endswith(COUNTER)}
        names = min(tables(network.family, ours), key=lambda way: len(set(way.values()) ^ theirs.keys()))
        body = {names[name]: shape for name, shape in ours.items() if not name.startswith("head.")}
        heads = {names[name] for name in ours if name.startswith("head.")}
        if {name: shape for name, shape in there.items() if name not in heads} == body:
            classes = max((there[name][0] for name in heads if there.get(name)), default=0)
            return f"these are the weights of a {network.name} with {classes} classes"
    return None


def _few(names: list[str], most: int = 2) -> str:
    return ", ".join(name[:40] for name in names[:most]) + (" ..." if len(names) > most else "")


def _cross(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"
