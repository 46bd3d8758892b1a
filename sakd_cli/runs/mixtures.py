"""The mixtures of a run as a file: every run that distils by them writes `dfa.json`, `--dfa-weights FILE` reads it."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

import torch

from sakd_cli import __version__, torchrun
from sakd_cli.config.method import MethodConfig
from sakd_cli.config.methods import DFAConfig
from sakd_cli.config.methods import Mixtures as Names
from sakd_cli.config.training import DistillConfig
from sakd_cli.distillers.dfa import DFA
from sakd_cli.documents.training import MixtureGroup, Mixtures
from sakd_cli.errors import UsageError
from sakd_cli.files import read_document, sha256
from sakd_cli.runs.extension import RunExtension, TrainerFactory
from sakd_cli.runs.job import Job
from sakd_cli.tasks.distill import DistillTask

NAME = "dfa.json"
LARGEST = 1e-4  # how far from 1 the weights of a group may sum


def from_file(settings: DFAConfig) -> bool:
    """Whether the mixtures of this method come from a file."""
    return settings.weights not in list(Names)


def pinned(settings: MethodConfig) -> MethodConfig:
    """The settings with the SHA-256 of the file they name, if they name one."""
    if not (isinstance(settings, DFAConfig) and from_file(settings)):
        return settings
    _read(settings)
    return settings.model_copy(update={"weights_sha256": sha256(Path(settings.weights))})


def load_mixtures(settings: MethodConfig, distiller: Any, teacher: str) -> None:
    """Take the mixtures of the file that the settings name, if they name one. UsageError where it does not fit."""
    if not (isinstance(settings, DFAConfig) and isinstance(distiller, DFA) and from_file(settings)):
        return
    found = _read(settings)
    if found.teacher != teacher:
        raise UsageError(f"{settings.weights}: holds mixtures of {found.teacher}, not of {teacher}")
    if found.norm != settings.norm:
        raise UsageError(
            f"{settings.weights}: was searched with norm {found.norm}, this run has {settings.norm}",
            hint=f"--set method.norm={found.norm}",
        )
    groups = {group.index: group for group in found.groups}
    ours = {group.stage: len(group.places) for group in distiller.groups}
    theirs = {index: group.blocks for index, group in groups.items()}
    if theirs != ours:
        raise UsageError(f"{settings.weights}: has {_blocks(theirs)}; this run mixes {_blocks(ours)}")
    for k, group in enumerate(distiller.groups):
        distiller.set_weights(k, torch.tensor(groups[group.stage].alpha))
    for made in _groups(distiller):
        told = groups[made.index]
        odd = [key for key in ("name", "positions", "largest") if getattr(told, key) != getattr(made, key)]
        if not math.isclose(told.entropy, made.entropy, abs_tol=LARGEST):
            odd.append("entropy")
        if odd:
            text = f"damaged: {odd[0]} of stage {made.index} is not {getattr(made, odd[0])}, as its weights have it"
            raise UsageError(f"{settings.weights}: {text}")


def of_job(job: Job) -> tuple[DFAConfig, DFA] | None:
    """Config and distiller of a job that mixes blocks; None for all others."""
    settings = job.config.method if isinstance(job.config, DistillConfig) else None
    distiller = job.task.feature_distiller if isinstance(job.task, DistillTask) else None
    return (settings, distiller) if isinstance(settings, DFAConfig) and isinstance(distiller, DFA) else None


def record(job: Job, warn: Callable[[str], None] | None = None) -> Mixtures | None:
    """What `dfa.json` of a run holds; of mixtures from a file, what that file held. None for methods without any."""
    if (found := of_job(job)) is None:
        return None
    settings, distiller = found
    dataset, seed = job.images.dataset.name, job.config.seed
    if from_file(settings):
        read = _read(settings)
        if warn is not None and read.dataset != dataset:
            warn(f"{settings.weights}: was found on {read.dataset}, and is used on {dataset}")
        return read
    prefixes = ("search_", "arch_", "st", "ts", "second_order", "joint")
    search = {key: value for key, value in settings.model_dump(mode="json").items() if key.startswith(prefixes)}
    return Mixtures(
        sakd=__version__,
        weights=settings.weights,
        teacher=distiller.groups[0].network,
        dataset=dataset,
        norm=settings.norm,
        distance=settings.distance,
        seed=seed,
        search=search if distiller.to_be_found else None,
        groups=_groups(distiller),
    )


def _groups(distiller: DFA) -> list[MixtureGroup]:
    groups = []
    for k, group in enumerate(distiller.groups):
        alpha = distiller.alpha(k)
        mixture = MixtureGroup(
            index=group.stage,
            name=group.name,
            blocks=len(group.places),
            positions=[place + 1 for place in group.places],
            beta=distiller.betas[k],
            alpha=alpha.tolist(),
            largest=int(alpha.argmax()) + 1,
            entropy=float(torch.special.entr(alpha.cpu().double()).sum()),
        )
        groups.append(mixture)
    return groups


@final
class MixturesExtension(RunExtension):
    """The mixtures of a run, in its plan and in its summary."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def validate(self) -> None:
        if (found := of_job(self.job)) is not None and found[1].to_be_found:
            torchrun.require_single_process("the search for mixtures")

    def plan(self) -> dict[str, Any]:
        return {"mixtures": record(self.job)}

    def finalize(self, factory: TrainerFactory, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        return self.plan() | {"search_seconds": figures.get("search", {}).get("seconds")}


def _read(settings: DFAConfig) -> Mixtures:
    """The file, checked. UsageError names what is wrong with it."""
    path = Path(settings.weights)
    if not path.is_file():
        raise UsageError(
            f"{path}: no such file", hint=f"--dfa-weights takes one of {', '.join(Names)}, or the {NAME} of a run"
        )
    if settings.weights_sha256 not in (None, sha256(path)):
        raise UsageError(f"{path}: is not the file this run began with (its SHA-256 differs)")
    try:
        found = read_document(path, Mixtures)
    except UsageError:
        found = None
    groups = found.groups if found else []
    each_once = len({group.index for group in groups}) == len(groups) > 0
    if found is None or not each_once or not all(map(_is_sound, groups)):
        raise UsageError(f"{path}: holds no mixtures of blocks, or damaged ones")
    return found


def _is_sound(group: MixtureGroup) -> bool:
    """Whether alpha can be the weights of its blocks, and the softmax of beta where the file has one."""
    alpha, fits = group.alpha, len(group.alpha) == group.blocks
    if not fits or min(alpha, default=-1) < 0 or not math.isclose(sum(alpha), 1, abs_tol=LARGEST):
        return False
    beta = torch.tensor(alpha).log() if group.beta is None else torch.tensor(group.beta)
    return len(beta) == len(alpha) and torch.allclose(beta.softmax(dim=0), torch.tensor(alpha), atol=LARGEST)


def _blocks(blocks: dict[int, int]) -> str:
    return ", ".join(f"{count} block{'s' * (count != 1)} of stage {index}" for index, count in blocks.items())
