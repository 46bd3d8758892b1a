"""Several distillations under one budget: a run and its controls, every router, several seeds"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from sakd_cli.config.base import own_name
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.routers import CLASSICAL, PLAIN, ROUTERS, AdaptiveConfig, RandomMatchedConfig
from sakd_cli.config.training import DistillConfig, TeacherConfig
from sakd_cli.documents.training import Summary
from sakd_cli.errors import UsageError, unknown
from sakd_cli.rundir import ResumePlan, RunDir
from sakd_cli.runs.resume import AUTO, resume_config
from sakd_cli.sweep.subprocesses import Order, run_together
from sakd_cli.torchrun import require_single_process

if TYPE_CHECKING:
    from sakd_cli.engine.reporter import Reporter

ALL = "all"
LEARNED = AdaptiveConfig().name

Train = Callable[[DistillConfig, ResumePlan], Summary]


def series(config: DistillConfig, params: Mapping[str, Any]) -> list[DistillConfig]:
    """What `--routers`, `--with-control` and `--seeds` make of a config: members that share all but router and seed.

    Seed by seed, and of each seed the learned router first, whose rates another may match.

    Raises UsageError for options that do not go together, before anything is trained.
    """
    if params["parallel"]:
        require_single_process("--parallel")
    names = _routers(config, params)
    members = [_member(config, name, config.seed + offset) for offset in range(params["seeds"] or 1) for name in names]
    if params["parallel"] and not is_series(params):
        raise UsageError("--parallel runs a series at once: it goes with --seeds, --with-control or --routers")
    if len(members) > 1:
        if params["run_dir"] is not None or params["overwrite"]:
            raise UsageError("--run-dir and --overwrite name one run; a series makes several", hint="--runs-dir DIR")
        if params["resume"] not in (None, AUTO):
            raise UsageError("--resume RUN goes on with one run; a series needs --resume auto")
    return members


def is_series(params: Mapping[str, Any]) -> bool:
    """Whether more than the run itself was asked for."""
    return bool(params["routers"] or params["with_control"] or (params["seeds"] or 1) > 1)


def _routers(config: DistillConfig, params: Mapping[str, Any]) -> list[str]:
    own, asked = config.router.name, params["routers"]
    if asked is None:
        return list(dict.fromkeys([own, CLASSICAL, PLAIN])) if params["with_control"] else [own]
    if params["router"] is not None or params["with_control"]:
        raise UsageError("--routers says which routers run; it goes with neither --router nor --with-control")
    names = (
        list(ROUTERS)
        if asked == ALL
        else list(dict.fromkeys(own_name(name, ROUTERS) or name for name in asked.split(",")))
    )
    for name in names:
        if name not in ROUTERS:
            raise UsageError(f"--routers: {unknown('router', name, [*ROUTERS, ALL])}")
    # Stable: what learns comes first, what matches another run's rates comes after that run.
    ranked = sorted(names, key=lambda name: (name != LEARNED, ROUTERS[name] is RandomMatchedConfig))
    matching = [name for name in ranked if ROUTERS[name] is RandomMatchedConfig]
    if matching and LEARNED not in names and not config.router.model_dump().get("run"):
        raise UsageError(f"--routers: {matching[0]} matches the rates of {LEARNED}, which must be among them")
    return ranked


def _member(config: DistillConfig, router: str, seed: int) -> DistillConfig:
    """The same settings with that router and seed; settings of the old router that the new one has not are dropped."""
    whole = ConfigSource("the series' settings", config.model_dump(mode="json"))
    changed = ConfigSource(
        "--routers", {"seed": seed} | ({} if config.router.name == router else {"router": {"name": router}})
    )
    member: DistillConfig = resolve("distill", [whole, changed]).config
    return member


def train_series(
    members: list[DistillConfig],
    train: Callable[[list[DistillConfig]], list[RunDir]],
    *,
    parallel: bool = False,
    teacher: TeacherConfig | None = None,
) -> list[RunDir]:
    """Train the members, one after another or (`parallel`) at once, those that match another's rates last.

    train    makes the runs of some configs, in order
    teacher  that of all of them; None: the one with which the first began

    A router that matches rates matches those of its own seed.
    """
    matching = [isinstance(config.router, RandomMatchedConfig) for config in members]
    batches = [[config] for config in members]
    if parallel:
        pairs = list(zip(members, matching, strict=True))
        batches = [[config for config, last in pairs if last is wanted] for wanted in (False, True)]
    runs: dict[tuple[str, int], RunDir] = {}
    for batch in filter(None, batches):
        found = train([_pinned(config, teacher, runs.get((LEARNED, config.seed))) for config in batch])
        runs |= {(config.router.name, config.seed): run for config, run in zip(batch, found, strict=True)}
        teacher = teacher or TeacherConfig.model_validate(found[0].config["teacher"])
    return [runs[config.router.name, config.seed] for config in members]


def _pinned(config: DistillConfig, teacher: TeacherConfig | None, adaptive: RunDir | None) -> DistillConfig:
    """The config with the teacher of the series and, where its router matches rates, the run that has them."""
    update: dict[str, Any] = {"teacher": teacher} if teacher else {}
    if adaptive is not None and isinstance(config.router, RandomMatchedConfig):
        update["router"] = config.router.model_copy(update={"run": str(adaptive.path.resolve())})
    return config.model_copy(update=update)


def train_here(train: Train, *, resume: bool) -> Callable[[list[DistillConfig]], list[RunDir]]:
    """Trains in this process; with `resume` each continues where it was stopped; a finished one is skipped."""

    def one_after_another(configs: list[DistillConfig]) -> list[RunDir]:
        runs = []
        for config in configs:
            config, plan = resume_config(config) if resume else (config, ResumePlan())
            summary = plan.summary if plan.finished else train(config, plan)
            runs.append(RunDir(Path(str(summary.run))))
        return runs

    return one_after_another


def train_in_processes(
    reporter: "Reporter", *, quiet: bool, resume: bool, resume_command: str
) -> Callable[[list[DistillConfig]], list[RunDir]]:
    """Trains each config in a process of its own, all at once. `resume_command`: what to type after a stop of all."""
    options = ["--json", *(["--quiet"] if quiet else []), *(["--resume", AUTO] if resume else [])]

    def at_once(configs: list[DistillConfig]) -> list[RunDir]:
        with tempfile.TemporaryDirectory() as folder:
            orders = []
            for place, config in enumerate(configs):
                file = Path(folder) / f"{place}.yaml"
                file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
                name = f"{config.router.name}, seed {config.seed}"
                orders.append(Order(name, ["distill", "--config", str(file), *options]))
            documents = run_together(orders, reporter, jobs=len(orders), again=resume_command)
        return [RunDir(Path(document["run"])) for document in documents]

    return at_once
