"""Several distillations under one budget: a run and its controls, every router, several seeds"""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from sakd_cli.cli.console import ConsoleReporter
from sakd_cli.config.resolve import ConfigSource, resolve
from sakd_cli.config.routers import CLASSICAL, PLAIN, ROUTERS, AdaptiveConfig, RandomMatchedConfig
from sakd_cli.config.training import DistillConfig, TeacherConfig
from sakd_cli.errors import UsageError, unknown
from sakd_cli.rundir import ResumePlan, RunDir
from sakd_cli.runs.resume import AUTO, resume_config
from sakd_cli.sweep.subprocesses import Order, run_together
from sakd_cli.torchrun import require_single_process

ALL = "all"
LEARNED = AdaptiveConfig().name

Train = Callable[[DistillConfig, ResumePlan], dict[str, Any]]


def series(config: DistillConfig, params: Mapping[str, Any]) -> list[DistillConfig]:
    """What `--routers`, `--with-control` and `--seeds` make of a config: twins that share all but router and seed.

    Seed by seed, and of each seed the learned router first, whose rates another may match.

    Raises UsageError for options that do not go together, before anything is trained.
    """
    if params["parallel"]:
        require_single_process("--parallel")
    names = _routers(config, params)
    members = [_twin(config, name, config.seed + offset) for offset in range(params["seeds"] or 1) for name in names]
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
    names = list(ROUTERS) if asked == ALL else list(dict.fromkeys(asked.split(",")))
    for name in names:
        if name not in ROUTERS:
            raise UsageError(f"--routers: {unknown('router', name, [*ROUTERS, ALL])}")
    # Stable: what learns comes first, what matches another run's rates comes after that run.
    ranked = sorted(names, key=lambda name: (name != LEARNED, ROUTERS[name] is RandomMatchedConfig))
    matching = [name for name in ranked if ROUTERS[name] is RandomMatchedConfig]
    if matching and LEARNED not in names and not config.router.model_dump().get("run"):
        raise UsageError(f"--routers: {matching[0]} matches the rates of {LEARNED}, which must be among them")
    return ranked


def _twin(config: DistillConfig, router: str, seed: int) -> DistillConfig:
    """The same words with that router and seed; words of the old router that the new one has not are dropped."""
    whole = ConfigSource("the series' words", config.model_dump(mode="json"))
    changed = ConfigSource(
        "--routers", {"seed": seed} | ({} if config.router.name == router else {"router": {"name": router}})
    )
    twin: DistillConfig = resolve("distill", [whole, changed]).config
    return twin


def train_all(members: list[DistillConfig], train: Train, *, resume: bool) -> list[RunDir]:
    """Run them in order; with `resume` each goes on where it was, or is left alone when it is finished.

    All learn from the teacher of the first, and a router that matches rates matches those of its own seed.
    """
    done: list[RunDir] = []
    adaptive: dict[int, str] = {}
    for config in members:
        words = config
        if done:
            teacher = TeacherConfig.model_validate(done[0].config["teacher"])
            words = words.model_copy(update={"teacher": teacher})
        if isinstance(words.router, RandomMatchedConfig) and words.seed in adaptive:
            router = words.router.model_copy(update={"run": adaptive[words.seed]})
            words = words.model_copy(update={"router": router})
        words, intent = resume_config(words) if resume else (words, ResumePlan())
        summary = intent.summary() if intent.finished else train(words, intent)
        done.append(RunDir(Path(summary["run"])))
        if isinstance(words.router, AdaptiveConfig):
            adaptive[words.seed] = str(done[-1].path.resolve())
    return done


def train_together(
    members: list[DistillConfig], teacher: TeacherConfig, talk: ConsoleReporter, *, resume: bool, again: str
) -> list[RunDir]:
    """Run them at once, each as a process, then those that match another's rates. As `train_all` does one by one.

    teacher  whom all learn from, unless one of them has begun with another
    again    the command that goes on with all after a stop
    """
    begun = [words.teacher for words, intent in map(resume_config, members) if intent.resume] if resume else []
    options = ["--json", *(["--quiet"] if talk.quiet else []), *(["--resume", AUTO] if resume else [])]
    runs: dict[tuple[str, int], RunDir] = {}
    for matching in (False, True):
        wave = [words for words in members if isinstance(words.router, RandomMatchedConfig) is matching]
        with tempfile.TemporaryDirectory() as folder:
            orders = []
            for place, config in enumerate(wave):
                words = config.model_copy(update={"teacher": [*begun, teacher][0]})
                if matching and (run := runs.get((LEARNED, words.seed))):
                    router = words.router.model_copy(update={"run": str(run.path.resolve())})
                    words = words.model_copy(update={"router": router})
                file = Path(folder) / f"{place}.yaml"
                file.write_text(yaml.safe_dump(words.model_dump(mode="json")), encoding="utf-8")
                name = f"{words.router.name}, seed {words.seed}"
                orders.append(Order(name, ["distill", "--config", str(file), *options]))
            documents = run_together(orders, talk, jobs=len(orders), again=again)
        for words, document in zip(wave, documents, strict=True):
            runs[words.router.name, words.seed] = RunDir(Path(document["run"]))
    return [runs[words.router.name, words.seed] for words in members]
