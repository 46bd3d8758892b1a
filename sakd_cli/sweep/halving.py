"""Successive halving of a sweep's grid and doses: many settings for few epochs, the best of them for more

Optuna decides, asynchronously (ASHA, Li et al., MLSys 2020): a cell passes on where it is among the best 1/factor of
those that came as far, by the mean top-1 over its seeds on the images that choose an epoch. Each stage is a whole run
with its schedule shortened in proportion, so that the rates have decayed when it is judged.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from sakd_cli.config.grid import Member, Role
from sakd_cli.report.render.format import fixed
from sakd_cli.sweep.executor import library

STAGES = 2  # before the one with all epochs
Train = Callable[[Sequence[Member]], Mapping[str, float]]


def dropped_by_halving(stages: Sequence[Sequence[Member]], factor: int, train: Train) -> dict[str, str]:
    """The cells that do not pass, and why.

    stages  the members of each, from the shortest one; train: trains members and gives, by key, their top-1
    Cells compete that differ in dose and grid only; coins stay or go with the run that they match.
    """
    optuna = library("optuna", "halving", "Optuna")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    out, races = dict[str, str](), dict[tuple[object, ...], dict[str, None]]()
    for member in stages[0]:
        if member.role is Role.student and member.matched is None:
            race = races.setdefault((member.pair, (member.method or "").split()[0], member.router), {})
            race[member.cell] = None
    for race in (cells for cells in races.values() if len(cells) > 1):
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=factor)
        study = optuna.create_study(direction="maximize", pruner=pruner)
        for cell in race:
            trial = study.ask()
            for stage, members in enumerate(stages):
                own = [member for member in members if member.cell == cell]
                needed = {member.teacher for member in own}
                if not (known := [*train([*(member for member in members if member.key in needed), *own]).values()]):
                    break  # it has failed, which the sweep says
                trial.report(fmean(known), factor**stage)
                if trial.should_prune():
                    epochs = own[0].config.train.epochs
                    out[cell] = f"halving: top-1 {fixed(fmean(known), 2)} % on validation after {epochs} epochs"
                    break
            study.tell(trial, state=optuna.trial.TrialState.PRUNED if cell in out else optuna.trial.TrialState.FAIL)
    for member in stages[0]:
        if member.matched is not None and member.matched.partition(" seed ")[0] in out:
            out[member.cell] = "halving: the run whose rates it has is left out"
    return out
