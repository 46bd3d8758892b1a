"""The student and its residual students, one after another: which come, when to stop, and the ensemble they make.

Each is a phase of the run with checkpoints of its own. Nothing else is kept for a resume: what is decided between two
phases is computed anew from the trained networks, on images that no student was trained on (Li et al., ResKD).
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from sakd_cli.config.networks import NETWORKS, find_network
from sakd_cli.config.preprocessing import ImageSize
from sakd_cli.config.training import DistillConfig, ResidualConfig
from sakd_cli.data.dataset import Split
from sakd_cli.documents.base import Part
from sakd_cli.documents.evaluation import ExitRule
from sakd_cli.documents.training import Energies, EnsembleTeacher, EnsembleTraining, PlannedNetwork
from sakd_cli.engine.reporter import Reporter
from sakd_cli.engine.trainer import MAIN, Trainer, TrainingOutput
from sakd_cli.errors import Stopped, UsageError
from sakd_cli.evaluation.early_exit import exit_curve, exit_metrics, never
from sakd_cli.models import artifact, ensemble
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.models.cost import Cost
from sakd_cli.models.ensemble import Ensemble, Offset, fit
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import cost_of
from sakd_cli.rundir import RunDir
from sakd_cli.runs.build import assemble, residual_stage
from sakd_cli.runs.extension import RunExtension, TrainerFactory, eval_batches
from sakd_cli.runs.job import Job
from sakd_cli.runs.phases import training
from sakd_cli.tasks.residual import relative_energy

FOLDER = "ensemble"
Batches = Iterable[tuple[Tensor, Tensor]]


class MemberWriter:
    """Writes a residual student into its checkpoints; the finished ensemble is written as a whole."""

    def __init__(self, network: StagedModel, card: NetworkCard) -> None:
        self.network, self.card = network, card

    def weights(self) -> bytes:
        return artifact.weights_bytes(self.network, self.card)

    def publish(self, run: RunDir, weights: bytes, facts: dict[str, Any]) -> None:
        return


def verdict(energies: Sequence[float], settings: ResidualConfig) -> tuple[bool, str | None]:
    """By the relative energies after each stage, whether the last member is dropped, and why no further one comes.

    The last stage was not worth its cost, or it was enough; None: another one may come.
    """
    if len(energies) > 1 and (gain := 1 - energies[-1] / energies[-2]) < settings.min_gain:
        how = "lowered" if gain > 0 else "raised"
        said = f"residual student {len(energies) - 1} {how} the energy by {abs(100 * gain):.1f} %"
        return True, said + " only" * (gain > 0)
    if energies[-1] < settings.energy:
        return False, f"the energy fell below {settings.energy:g}"
    return False, None


def lighter(first: str, before: str, ratio: float, classes: int, side: ImageSize) -> str:
    """The largest network of the family of `first` with at most `ratio` of the MACs of `before`.

    Where there is none, the family's cheapest; but where `first` is that itself, all families are looked through.
    """
    family = [name for name, network in NETWORKS.items() if network.family == find_network(first).family]
    family = family or list(NETWORKS)  # a plug-in's network has none of its kind here
    cheapest = min(cost_of(name, classes, side).macs for name in family)
    if cost_of(first, classes, side).macs <= cheapest:
        family = list(NETWORKS)
    macs = {name: cost_of(name, classes, side).macs for name in family}
    limit = ratio * cost_of(before, classes, side).macs
    fitting = {name: count for name, count in macs.items() if count <= limit}
    return max(fitting, key=lambda name: fitting[name]) if fitting else min(macs, key=lambda name: macs[name])


def planned(
    student: str, teacher: Cost, settings: ResidualConfig, classes: int, side: ImageSize
) -> tuple[list[str], str]:
    """Names of the residual students as far as their number and cost allow, and which of the two ends the list."""
    names = [student]
    macs = cost_of(student, classes, side).macs
    for place in range(settings.students):
        named = settings.architectures
        name = named[place % len(named)] if named else lighter(student, names[-1], settings.ratio, classes, side)
        macs += cost_of(name, classes, side).macs
        if macs > settings.max_cost * teacher.macs:
            text = f"{' + '.join([*names, name])} would cost {100 * macs / teacher.macs:.1f} % of the teacher"
            return names[1:], f"{text}, more than residual.max_cost ({100 * settings.max_cost:g} %)"
        names.append(name)
    return names[1:], f"{settings.students} were asked for"


class _Gap:
    """What the members so far lack on one split, stage by stage."""

    def __init__(self, split: Split, job: Job, reporter: Reporter) -> None:
        assert job.teacher is not None
        self.batches = eval_batches(job, split, reporter)
        self.teacher = _logits(job.teacher.model, self.batches)
        self.stages: list[Tensor] = []
        self.energies: list[float] = []

    def add(self, network: nn.Module) -> None:
        own = _logits(network, self.batches)
        self.stages.append(self.stages[-1] + own if self.stages else own)
        self.energies.append(relative_energy(self.teacher, self.stages[-1]))


@torch.no_grad()
def _logits(network: nn.Module, batches: Batches) -> Tensor:
    """Logits [N, K] of a network in evaluation mode."""
    with _between_phases():
        return torch.cat([network(images) for images, _ in batches])


@contextmanager
def _between_phases() -> Iterator[None]:
    """A stop here loses no step."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.signal, "all that was trained is saved") from None


@final
class ResidualExtension(RunExtension):
    """Plans the residual students of a job, hands them out one by one, and closes with an ensemble.

    Raises UsageError where the costs allow none.
    """

    label = "residual"

    def __init__(self, job: Job) -> None:
        assert isinstance(job.config, DistillConfig)
        self.job, self.settings = job, job.config.residual
        classes, side = len(job.images.dataset.classes), job.images.side
        self.names, self.stopped = planned(job.network.name, job.teachers[0].cost, self.settings, classes, side)
        if not self.names:
            raise UsageError(
                f"residual students: {self.stopped}",
                hint="--set residual.max_cost=..., or a lighter student or residual.architectures",
            )
        self.costs = [cost_of(name, classes, side) for name in self.names]
        self.members: list[StagedModel] = []
        self.dropped = 0

    def validate(self) -> None:
        """Refuse a method that cannot be used for a residual student; the networks are built when their turn comes."""
        job = self.job
        assert isinstance(job.config, DistillConfig)
        assert job.teacher is not None
        for name in self.names if self.settings.loss == "inner" else ():
            config, classes = job.config.model_copy(update={"student": name}), len(job.images.dataset.classes)
            network = artifact.meta_network(name, classes, job.images.side)
            assemble(config, network, job.teacher.model, job.images.side, job.images.train.labels, mode=job.mode)

    def networks(self) -> list[PlannedNetwork]:
        pairs = zip(self.names, self.costs, strict=True)
        return [PlannedNetwork(role="residual student", name=name, **cost._asdict()) for name, cost in pairs]

    def trainings(self, factory: TrainerFactory) -> Iterator[Trainer]:
        train, calibration = self.job.images.train, self.job.images.calibration
        assert calibration is not None
        spread = torch.linspace(0, len(train) - 1, min(len(train), len(calibration))).long()
        self.held_out = _Gap(calibration, self.job, factory.reporter)
        self.seen = _Gap(train.subset(spread), self.job, factory.reporter)
        self.labels = calibration.labels.to(self.job.device)
        self._join(self.job.network)
        for number, name in enumerate(self.names, start=1):
            drop, stopped = verdict(self.held_out.energies, self.settings)
            if stopped is not None:
                break
            base = Ensemble(list(self.members)).eval().forward
            job = residual_stage(self.job, name, number, base)
            evaluation = factory.evaluation._replace(wrap=partial(Offset, base=base))
            output = TrainingOutput(evaluation, MemberWriter(job.network, job.card))
            yield from training(job, f"residual-{number}", output, factory)
            self._join(job.network)
        drop, stopped = verdict(self.held_out.energies, self.settings)
        self.stopped = stopped or self.stopped
        if drop:
            self.members.pop()
            self.dropped = 1

    def _join(self, network: StagedModel) -> None:
        self.members.append(network.requires_grad_(False).eval())
        for gap in (self.held_out, self.seen):
            gap.add(network)

    def finalize(self, factory: TrainerFactory, figures: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Fit the thresholds, write the folder `ensemble/`, and return its figures on the test images."""
        teacher, *_, cost = self.job.teachers[0]
        whole = Ensemble(self.members).eval()
        stages = torch.stack(self.held_out.stages[: len(self.members)])
        macs = [self.job.cost.macs, *(cost.macs for cost in self.costs)][: len(self.members)]
        exits = fit(self.settings, stages, self.labels, macs, cost.macs)
        about: dict[str, Any] = {
            "rule": ExitRule(**self.settings.exits()),
            "energies": Energies(calibration=self.held_out.energies, train=self.seen.energies),
            "dropped": self.dropped,
            "stopped": self.stopped,
            "teacher": EnsembleTeacher(architecture=teacher.model.name, sha256=teacher.sha256, macs=cost.macs),
            "calibration_images": len(self.labels),
        }
        facts = {key: part.plain() if isinstance(part, Part) else part for key, part in about.items()}
        ensemble.save(factory.run.path / FOLDER, whole, self.job.card, exits, facts)
        test, classes = factory.evaluation.test, len(self.job.images.dataset.classes)
        phases = [MAIN, *(f"residual-{number}" for number in range(1, len(self.names) + 1))]
        with _between_phases():
            trained = EnsembleTraining(
                **about,
                members=[str(getattr(member, "name", "")) for member in self.members],
                member_macs=macs,
                thresholds=list(exits.thresholds),
                early=exit_metrics(whole, exits, test, classes, macs, cost.macs),
                all=exit_metrics(whole, never(exits), test, classes, macs, cost.macs),
                curve=exit_curve(whole, exits, test, macs, cost.macs),
                stage_top1=[figures[phase]["last"]["top1"] for phase in phases if phase in figures],
            )
        return {"ensemble": trained}
