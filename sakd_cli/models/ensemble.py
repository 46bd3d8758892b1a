"""A student with its residual students: networks whose logits are summed, run as far as a sample needs, and on disk.

A sample exits at the first stage n whose uncertainty is at most thresholds[n]; after the last stage all do. Thresholds
are fitted on validation images (Li et al., ResKD).

ensemble.json          members in order (architecture, file, SHA-256, MACs), exits, energies, teacher; written last
member-N.safetensors   each opens alone, as every weights file of ours
README.md
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.config.preprocessing import size_text
from sakd_cli.config.training import ResidualConfig
from sakd_cli.errors import UsageError, unreadable
from sakd_cli.files import CARD_SEAL, read_json, sealed, sha256, unsealed
from sakd_cli.models import artifact
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.cost import cost
from sakd_cli.models.staged import StagedModel
from sakd_cli.writing import write_aside, write_json

FORMAT, INDEX = "sakd.ensemble/1", "ensemble.json"
NEVER = -1.0  # below every uncertainty


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(z) in units of log K."""
    log = F.log_softmax(logits, dim=-1)
    return -(log.exp() * log).sum(dim=-1) / math.log(logits.shape[-1])


def maxprob(logits: Tensor) -> Tensor:
    return 1 - logits.softmax(dim=-1).amax(dim=-1)


def margin(logits: Tensor) -> Tensor:
    first, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return 1 - (first - second)


def energy(logits: Tensor) -> Tensor:
    """Minus log-sum-exp of the logits, scaled by its range on validation images."""
    return -logits.logsumexp(dim=-1)


MEASURES: dict[str, Callable[[Tensor], Tensor]] = {one.__name__: one for one in (entropy, maxprob, margin, energy)}
RANGES = {"entropy": (0.0, 1.0), "maxprob": (0.0, 1.0), "margin": (0.0, 1.0)}


class Exits(NamedTuple):
    """uncertainty: its name; scale: what counts as 0 and as 1; thresholds: one per stage but the last."""

    uncertainty: str
    scale: tuple[float, float]
    thresholds: tuple[float, ...]

    def uncertainties(self, logits: Tensor) -> Tensor:
        """Logits [..., K] to uncertainties [...] in [0, 1]."""
        low, high = self.scale
        return ((MEASURES[self.uncertainty](logits.float()) - low) / max(high - low, 1e-12)).clamp(0, 1)


def exit_stage(uncertainties: Tensor, thresholds: Sequence[float]) -> Tensor:
    """Uncertainties [M, N] after all stages but the last to the stage [N], 0 .. M, at which each sample leaves."""
    limits = uncertainties.new_tensor(thresholds)[:, None]
    return (~(uncertainties <= limits)).long().cumprod(dim=0).sum(dim=0)


def fit(config: ResidualConfig, stages: Tensor, labels: Tensor, macs: Sequence[int], teacher_macs: int | None) -> Exits:
    """Thresholds by `config.rule` from logits after each stage, [M+1, N, K], of images that were not trained on.

    macs: of each member; teacher_macs: what a budget is a fraction of (None: of all members together).
    """
    stages, labels = stages.cpu(), labels.cpu()  # running sums have no deterministic form on CUDA (torch 2.11)
    if (scale := RANGES.get(config.uncertainty)) is None:
        values = MEASURES[config.uncertainty](stages.float())
        scale = float(values.min()), float(values.max())
    exits = Exits(config.uncertainty, scale, ())
    uncertainties = exits.uncertainties(stages[:-1])
    match config.rule:
        case "agreement":
            predictions = stages.argmax(dim=-1)
            changed = (predictions[:-1] != predictions[-1:]).double()
            found = _stage_by_stage(uncertainties, changed, config.delta)
        case "accuracy":
            right = (stages.argmax(dim=-1) == labels).double()
            found = _stage_by_stage(uncertainties, right[-1:] - right[:-1], config.delta)
        case "budget":
            found = [_within(config.budget * (teacher_macs or sum(macs)), uncertainties, macs)] * len(uncertainties)
        case _:  # fixed
            found = [config.theta] * len(uncertainties)
    return exits._replace(thresholds=tuple(found))


def _stage_by_stage(uncertainties: Tensor, losses: Tensor, delta: float) -> list[float]:
    """Per stage the threshold that lets most of those who reach it leave at a mean loss of at most `delta`."""
    reached = torch.ones(uncertainties.shape[1], dtype=torch.bool, device=uncertainties.device)
    found = []
    for uncertainty, loss in zip(uncertainties, losses, strict=True):
        found.append(_longest_prefix(uncertainty[reached], loss[reached], delta))
        reached = reached & (uncertainty > found[-1])
    return found


def _longest_prefix(uncertainty: Tensor, loss: Tensor, delta: float) -> float:
    """The last uncertainty of the longest prefix, the surest first, that holds the bound; equal ones go together."""
    ranked, order = uncertainty.sort(stable=True)
    mean = loss[order].cumsum(0) / torch.arange(1, len(order) + 1, device=loss.device)
    ends = torch.ones_like(ranked, dtype=torch.bool)
    ends[:-1] = ranked[1:] != ranked[:-1]
    fits = (ends & (mean <= delta)).nonzero()
    return float(ranked[fits[-1]]) if len(fits) else NEVER


def _within(limit: float, uncertainties: Tensor, macs: Sequence[int]) -> float:
    """The smallest shared threshold with a mean cost of at most `limit`; where none is, the one that all leave at."""
    candidates = [NEVER, *uncertainties.unique().tolist()]

    def fits(theta: float) -> bool:
        return mean_macs(exit_stage(uncertainties, [theta] * len(uncertainties)), macs) <= limit

    place = bisect_left(candidates, True, key=fits)
    return float(candidates[min(place, len(candidates) - 1)])


def mean_macs(left: Tensor, macs: Sequence[int]) -> float:
    """Mean multiply-accumulates per sample, from the stage [N] at which each left and the MACs of each member."""
    return float(torch.tensor(macs, dtype=torch.float64).cumsum(0)[left.cpu()].mean())


class Ensemble(nn.Module):
    """z_n = z_0 + r_1 + ... + r_n: the logits after stage n (ResKD: Li et al., IEEE TIP 30, 2021)."""

    members: nn.ModuleList

    def __init__(self, members: Sequence[StagedModel]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to the logits of all members, [N, K]."""
        *_, logits = accumulate(member(images) for member in self.members)
        return logits

    def stages(self, images: Tensor) -> Tensor:
        """Images to the logits after each stage, [M+1, N, K]."""
        return torch.stack(list(accumulate(member(images) for member in self.members)))

    def adaptive(self, images: Tensor, exits: Exits) -> tuple[Tensor, Tensor]:
        """Images to logits [N, K] and exit stages [N], in evaluation mode; a member runs on what reaches it only."""
        first, *others = self.members
        logits = first(images)
        left = torch.full((len(images),), len(others), device=images.device)
        alive = torch.arange(len(images), device=images.device)
        for stage, (member, limit) in enumerate(zip(others, exits.thresholds, strict=True)):
            leaves = exits.uncertainties(logits[alive]) <= limit
            left[alive[leaves]] = stage
            alive = alive[~leaves]
            if not len(alive):
                break
            logits[alive] = logits[alive] + member(images[alive])
        return logits, left


class Offset(nn.Module):
    """A network whose logits are added to those that `base` gives; `base` is no part of it: no state, no mode."""

    def __init__(self, network: nn.Module, base: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network = network
        self.base = base

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, K]."""
        return self.base(images) + self.network(images)


class LoadedEnsemble(NamedTuple):
    """What was read back: networks on the CPU and in evaluation mode, the card, the exits, all of the index."""

    ensemble: Ensemble
    card: NetworkCard
    exits: Exits
    about: dict[str, Any]
    sha256: str


def save(folder: Path, ensemble: Ensemble, card: NetworkCard, exits: Exits, facts: dict[str, Any]) -> None:
    """Write the folder, ensemble.json last; `facts`: further entries of it, with `rule` and `teacher` (its MACs)."""
    folder.mkdir(exist_ok=True)
    members = []
    for place, member in enumerate(ensemble.members):
        assert isinstance(member, StagedModel)
        file = folder / f"member-{place}.safetensors"
        artifact.save_weights(file, member, card._replace(architecture=member.name))
        entry = {"architecture": member.name, "file": file.name, "sha256": sha256(file)}
        members.append(entry | cost(member, card.side)._asdict())
    for stale in set(folder.glob("member-*.safetensors")) - {folder / str(entry["file"]) for entry in members}:
        stale.unlink()
    write_aside(folder / "README.md", _readme(card, members).encode())
    entries = {key: value for key, value in card.config_entries().items() if key != "architecture"}
    index = {"format": FORMAT, **entries, "members": members, "exits": exits._asdict()}
    write_json(folder / INDEX, sealed(index | facts, CARD_SEAL))


def load(folder: Path) -> LoadedEnsemble:
    """Read the folder of an ensemble. Raises UsageError where it is missing, damaged or not ours."""
    file = folder / INDEX
    try:
        about = read_json(file)
        if about["format"] != FORMAT:
            raise UsageError(f"{file}: not an ensemble of this sakd (format {about['format']!r}, expected {FORMAT!r})")
        saved = about["exits"]
        low, high = saved["scale"]
        thresholds = tuple(float(limit) for limit in saved["thresholds"])
        exits = Exits(str(saved["uncertainty"]), (float(low), float(high)), thresholds)
        exits.uncertainties(torch.zeros(1, 2))  # an unknown uncertainty has no function
        teacher_macs, rule = int(about["teacher"]["macs"]), dict(about["rule"])
        files = [(folder / Path(entry["file"]).name, entry["sha256"]) for entry in about["members"]]
        if len(files) != len(thresholds) + 1:
            raise ValueError(f"{len(files)} members and {len(thresholds)} thresholds")
        about = unsealed(about, CARD_SEAL, needed=True)
        about |= {"rule": rule, "teacher": about["teacher"] | {"macs": teacher_macs}}
    except OSError as error:
        raise UsageError(f"{file}: {unreadable(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{file}: damaged or not an ensemble ({error})") from None
    members = []
    for path, digest in files:
        members.append(artifact.load(path))
        if members[-1].sha256 != digest:
            raise UsageError(f"{path}: is not the member that {INDEX} names (its SHA-256 differs)")
        if members[-1].card.classes != members[0].card.classes:
            raise UsageError(f"{path}: its classes are not those of the first member")
    ensemble = Ensemble([member.model for member in members]).eval()
    return LoadedEnsemble(ensemble, members[0].card, exits, about, sha256(file))


def _readme(card: NetworkCard, members: list[dict[str, Any]]) -> str:
    names = " + ".join(str(entry["architecture"]) for entry in members)
    return (
        f"# {names} on {card.dataset}\n\n"
        f"A student and its residual students for {len(card.classes)} classes, {size_text(card.side)} pixels, trained "
        "with sakd.\nTheir logits are summed; an image whose uncertainty after member n is at most thresholds[n] needs "
        "no further one.\n\n"
        "`ensemble.json` has the order, the thresholds, the class names, and the mean and standard deviation of pixel\n"
        "values between 0 and 1; every `member-N.safetensors` also opens alone.\n\n"
        "    sakd eval .\n"
    )
