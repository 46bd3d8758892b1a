"""The options that commands share, and how they become a config. No torch."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from sakd_cli.config import datasets, methods, networks, presets, routers, sources
from sakd_cli.config.resolve import Resolved, resolve


def names(table: Callable[[], Mapping[str, Any]]) -> Callable[[str], list[str]]:
    """Shell completion from a table of names."""
    return lambda incomplete: [name for name in table() if name.startswith(incomplete)]


complete_networks = names(lambda: dict.fromkeys(networks.all_names()))

ModelArgument = Annotated[
    str | None, typer.Argument(help="Network to train, as in `sakd list models`.", autocompletion=complete_networks)
]
Teacher = Annotated[
    str | None,
    typer.Option(
        help="Architecture (its newest finished run), run directory or weights file. [env: SAKD_TEACHER]",
        autocompletion=complete_networks,
        rich_help_panel="Distillation",
    ),
]
TeacherWeights = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="Its weights: sakd's, or (with --teacher torchvision/... or timm/...) that library's. "
        "[env: SAKD_TEACHER_WEIGHTS]",
        rich_help_panel="Distillation",
    ),
]
Head = Annotated[
    str | None,
    typer.Option(
        metavar="keep|replace",
        help="Last layer of weights that training starts from; replace: a fresh one. [env: SAKD_HEAD]",
        rich_help_panel="Training",
    ),
]
Student = Annotated[
    str | None,
    typer.Option(
        help="Network to train. [env: SAKD_STUDENT]",
        autocompletion=complete_networks,
        rich_help_panel="Distillation",
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="What to distil, as in `sakd list methods`. [env: SAKD_METHOD]",
        autocompletion=names(lambda: methods.METHODS),
        rich_help_panel="Distillation",
    ),
]
DfaWeights = Annotated[
    str | None,
    typer.Option(
        "--dfa-weights",
        metavar="FILE|WORD",
        help="Of --method dfa: search, uniform, last, random, or an earlier run's dfa.json. [env: SAKD_DFA_WEIGHTS]",
        rich_help_panel="Distillation",
    ),
]
Router = Annotated[
    str | None,
    typer.Option(
        help="Where to distil: adaptive, always, random, random-matched, anti, never. [env: SAKD_ROUTER]",
        autocompletion=names(lambda: routers.ROUTERS),
        rich_help_panel="Distillation",
    ),
]
ResidualStudents = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Then train N lighter ones on what is still missing (0). [env: SAKD_RESIDUAL_STUDENTS]",
        rich_help_panel="Distillation",
    ),
]
Pretrain = Annotated[
    bool | None,
    typer.Option(
        "--pretrain", help="Train the teacher first if no finished run is there.", rich_help_panel="Distillation"
    ),
]
WithControl = Annotated[
    bool,
    typer.Option(
        "--with-control",
        help="Also run the always-on and the undistilled twin (routers always, never) and compare the three.",
        rich_help_panel="Series",
    ),
]
Routers = Annotated[
    str | None,
    typer.Option(
        metavar="NAME,...|all",
        help="Run each of these routers under one budget and compare them.",
        rich_help_panel="Series",
    ),
]
Seeds = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Run N seeds, from --seed on, and show mean and spread.",
        rich_help_panel="Series",
    ),
]
Together = Annotated[
    bool,
    typer.Option("--together", help="Run all of a series at once, each as a process.", rich_help_panel="Series"),
]
StudentFriendly = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME",
        help="Train together with branches of this student; may be given again. [env: SAKD_STUDENT_FRIENDLY]",
        autocompletion=complete_networks,
        rich_help_panel="Distillation",
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="A whole run by name, as in `sakd list presets`.",
        autocompletion=names(presets.presets),
        rich_help_panel="Configuration",
    ),
]
ConfigFile = Annotated[
    Path | None, typer.Option(help="A whole run or part of one as YAML.", rich_help_panel="Configuration")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any key, such as data.limit=1000.", rich_help_panel="Configuration"
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="Images to learn from, as in `sakd list datasets`. [env: SAKD_DATASET]",
        autocompletion=names(lambda: datasets.DATASETS),
        rich_help_panel="Data",
    ),
]
DataRoot = Annotated[
    str | None, typer.Option(help="Folder of the data set's files. [env: SAKD_DATA_ROOT]", rich_help_panel="Data")
]
RunsDir = Annotated[
    str | None, typer.Option(help="Folder of the run directories (runs). [env: SAKD_RUNS_DIR]", rich_help_panel="Run")
]
RunFolder = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", metavar="DIR", help="Make the run exactly here, not in a new folder.", rich_help_panel="Run"
    ),
]
Resume = Annotated[
    str | None,
    typer.Option(
        metavar="auto|RUN",
        help="Go on with a run, bit for bit. auto: the newest with these words, or a new one.",
        rich_help_panel="Run",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="With --run-dir: replace the run that is there.", rich_help_panel="Run")
]
Epochs = Annotated[
    str | None,
    typer.Option(metavar="N", help="Passes over the images (240). [env: SAKD_EPOCHS]", rich_help_panel="Training"),
]
BatchSize = Annotated[
    str | None,
    typer.Option(metavar="N", help="Images per step (64). [env: SAKD_BATCH_SIZE]", rich_help_panel="Training"),
]
Seed = Annotated[
    str | None, typer.Option(metavar="N", help="Of all random draws (0). [env: SAKD_SEED]", rich_help_panel="Training")
]
Device = Annotated[
    str | None, typer.Option(help="auto, cpu, cuda, cuda:1, mps. [env: SAKD_DEVICE]", rich_help_panel="Run")
]
Precision = Annotated[
    str | None, typer.Option(help="Of the networks: fp32, bf16. [env: SAKD_PRECISION]", rich_help_panel="Run")
]
Deterministic = Annotated[
    bool | None,
    typer.Option("--deterministic", help="The same bits from the same seed on a GPU too.", rich_help_panel="Run"),
]
TeacherCache = Annotated[
    bool | None,
    typer.Option(
        "--teacher-bank",
        help="Keep the teacher's answers on the disk: no teacher pass, now and in later runs (kd, crd, rkd ...).",
        rich_help_panel="Distillation",
    ),
]
AllowTeacherMismatch = Annotated[
    bool | None,
    typer.Option(
        "--allow-teacher-mismatch",
        help="Take the teacher also where it scores otherwise than its card says.",
        rich_help_panel="Distillation",
    ),
]
Compile = Annotated[
    bool | None, typer.Option("--compile", help="Compile the step into one graph.", rich_help_panel="Run")
]
SyncBatchNorm = Annotated[
    bool | None,
    typer.Option(
        "--sync-batchnorm", help="Under torchrun: BatchNorm sees all processes' images.", rich_help_panel="Run"
    ),
]
Gather = Annotated[
    bool | None,
    typer.Option(
        "--gather", help="Under torchrun: losses between samples compare all processes'.", rich_help_panel="Run"
    ),
]
Log = Annotated[
    str | None,
    typer.Option(
        metavar="tensorboard",
        help="Write the figures for TensorBoard too, into the run directory. [env: SAKD_LOG]",
        rich_help_panel="Run",
    ),
]
Holdout = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE",
        help="Training images kept for choosing the best epoch (0.1); 0: the test set chooses. [env: SAKD_HOLDOUT]",
        rich_help_panel="Data",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Exactly one JSON document on stdout.", rich_help_panel="Output")]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="No talk and no progress on stderr, only errors.", rich_help_panel="Output"),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Build everything, try one real batch, write nothing.", rich_help_panel="Run")
]


def resolved(task: str, params: Mapping[str, Any]) -> Resolved:
    """The config that the options of a command make."""
    return resolve(task, sources.layers(params))
