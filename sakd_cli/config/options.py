"""The table of options: each row serves the commands, the environment, `sakd config show`, the API and completion.

To add an option, add a row. A row with a `key` sets that key of the config, and `SAKD_` + its name does so from the
environment; a row without one is an order to the command alone.
"""

from pathlib import Path
from typing import Any, NamedTuple

TRAIN = "pretrain-teacher distill"
NETWORKS = "distill eval bench"
IMAGES = f"{TRAIN} eval import-weights inspect-spots"
SETTINGS = f"{IMAGES} sweep export"
PLACES = f"{TRAIN} eval sweep export inspect-spots"
MACHINE = f"{TRAIN} eval sweep import-weights inspect-spots bench"
DOCUMENTS = f"{SETTINGS} bench data-check list show-method show-key show-schema config-show compare report"


class Option(NamedTuple):
    """One option.

    name      of the parameter; the option is `--` + the name with hyphens
    key       of the config that it sets; empty: none
    commands  that have it, with blanks between them
    type      of the value that the command gets; text is read by the config
    complete  kind of `sakd list` whose names the shell completes
    """

    name: str
    key: str
    help: str
    panel: str
    commands: str
    metavar: str | None = None
    type: Any = str | None
    complete: str = ""
    least: int | None = None

    @property
    def flag(self) -> str:
        """As it is given on the command line."""
        return f"--{self.name.rstrip('_').replace('_', '-')}"

    @property
    def variable(self) -> str:
        """Its environment variable."""
        return f"SAKD_{self.name.upper()}"


SWITCH, FLAG, TEXTS = bool | None, bool, list[str] | None
# fmt: off
_ROWS = [
    Option("teacher", "teacher.source", "Teacher: architecture (its newest finished run), run directory or file",
           "Distillation", NETWORKS, "TEACHER", complete="models"),
    Option("teacher_weights", "teacher.weights", "Weights file of the teacher: sakd's, or its library's (timm/...)",
           "Distillation", "distill", "FILE"),
    Option("student", "student", "Network to train", "Distillation", "distill bench", "NAME", complete="models"),
    Option("model", "model", "Network to pretrain", "Distillation", "pretrain-teacher", "NAME", complete="models"),
    Option("method", "method.name", "Distillation method, as in `sakd list methods`",
           "Distillation", "distill bench", "NAME", complete="methods"),
    Option("temperature", "method.temperature", "Softmax temperature of the logit loss (default: the method's)",
           "Distillation", "distill", "T"),
    Option("loss_weight", "method.weight", "Weight of the feature loss (default: the method's)",
           "Distillation", "distill", "WEIGHT"),
    Option("dfa_weights", "method.weights", "Mixtures of method dfa: search, uniform, last, random or a dfa.json",
           "Distillation", "distill", "FILE|NAME"),
    Option("router", "router.name", "Where to distill, as in `sakd list routers`",
           "Distillation", "distill", "NAME", complete="routers"),
    Option("residual_students", "residual.students", "Lighter networks to train afterwards on the remaining error",
           "Distillation", "distill", "N"),
    Option("pretrain", "teacher.pretrain", "Train the teacher first if it has no finished run",
           "Distillation", "distill", type=SWITCH),
    Option("cache_teacher", "teacher.cache", "Cache the teacher's outputs on disk for later runs (kd, crd, rkd ...)",
           "Distillation", "distill", type=SWITCH),
    Option("allow_teacher_mismatch", "teacher.allow_mismatch", "Accept a teacher whose accuracy differs from its card",
           "Distillation", "distill", type=SWITCH),
    Option("student_friendly", "friendly.students", "Train jointly with branches of this student; may be repeated",
           "Distillation", "pretrain-teacher", "NAME", TEXTS, "models"),
    Option("with_control", "", "Also run the controls (routers always and never) and compare the three",
           "Series", "distill", type=FLAG),
    Option("routers", "", "Run each of these routers under one budget and compare them",
           "Series", "distill", "NAME,...|all"),
    Option("seeds", "", "Run N seeds, starting at --seed, and report mean and standard deviation",
           "Series", "distill", "N", int | None, least=1),
    Option("parallel", "", "Run all members of a series at once, each in its own process",
           "Series", "distill", type=FLAG),
    Option("epochs", "train.epochs", "Passes over the training images", "Training", TRAIN, "N"),
    Option("batch_size", "train.batch_size", "Images per step", "Training", f"{TRAIN} bench", "N"),
    Option("lr", "train.lr", "Initial learning rate (default: the network's, 0.05 or 0.01)", "Training", TRAIN, "RATE"),
    Option("milestones", "train.milestones", "Epochs at whose end the rate decays (default: 5/8, 6/8 and 7/8 of all)",
           "Training", TRAIN, "N,..."),
    Option("seed", "seed", "Random seed", "Training", TRAIN, "N"),
    Option("head", "head", "Last layer of pretrained initial weights: keep it, or replace it by a fresh one",
           "Training", TRAIN, "keep|replace"),
    Option("dataset", "data.name", "Data set, as in `sakd list datasets`", "Data", IMAGES, "NAME", complete="datasets"),
    Option("data_root", "data.root", "Folder of the data set's files", "Data", f"{SETTINGS} data-check", "DIR"),
    Option("validation", "data.validation", "Fraction of the training images that validates; 0: the test set does",
           "Data", TRAIN, "FRACTION"),
    Option("preset", "", "Complete configuration by name, as in `sakd list presets`",
           "Configuration", f"{TRAIN} eval config-show", "NAME", complete="presets"),
    Option("config", "", "YAML file with a complete or partial configuration",
           "Configuration", f"{TRAIN} eval inspect-spots config-show", "FILE", Path | None),
    Option("set_", "", "Set any key of the configuration, such as data.limit=1000; may be repeated",
           "Configuration", f"{SETTINGS} bench data-check config-show", "KEY=VALUE", TEXTS),
    Option("runs_dir", "runs_dir", "Folder of the run directories", "Run", PLACES, "DIR"),
    Option("run_dir", "", "Write the run to exactly this directory", "Run", TRAIN, "DIR", Path | None),
    Option("resume", "", "Resume a run, bit for bit; auto: the newest with these settings, or a new one",
           "Run", TRAIN, "auto|RUN"),
    Option("overwrite", "", "With --run-dir: replace the run that is there", "Run", TRAIN, type=FLAG),
    Option("device", "device", "Device: auto, cpu, cuda, cuda:1 or mps", "Run", MACHINE, "DEVICE"),
    Option("precision", "runtime.precision", "Precision of the networks", "Run", f"{TRAIN} sweep bench",
           "fp32|bf16"),
    Option("compile", "runtime.compile", "Compile the step into one graph", "Run", f"{TRAIN} bench", type=SWITCH),
    Option("deterministic", "runtime.deterministic", "Bit-identical results from the same seed on a GPU as well",
           "Run", TRAIN, type=SWITCH),
    Option("sync_batchnorm", "runtime.sync_batchnorm", "Under torchrun: synchronize BatchNorm across processes",
           "Run", TRAIN, type=SWITCH),
    Option("global_batch", "runtime.global_batch", "Under torchrun: losses between samples compare the global batch",
           "Run", "distill", type=SWITCH),
    Option("log", "log", "Also log to TensorBoard, in the run directory", "Run", TRAIN, "tensorboard"),
    Option("dry_run", "", "Build everything and try one real batch; write nothing", "Run", TRAIN, type=FLAG),
    Option("json", "", "Print exactly one JSON document to stdout", "Output", DOCUMENTS, type=FLAG),
    Option("quiet", "", "Print no log messages and no progress to stderr, only errors",
           "Output", f"{SETTINGS} bench data-check report", type=FLAG),
]
# fmt: on
OPTIONS = {row.name: row for row in _ROWS}


def options_of(command: str) -> dict[str, Option]:
    """The rows of a command. `config-show` has all those that set a key in a training."""
    trained = {*TRAIN.split()}
    return {
        name: row
        for name, row in OPTIONS.items()
        if command in (has := row.commands.split()) or (command == "config-show" and row.key and trained & {*has})
    }
