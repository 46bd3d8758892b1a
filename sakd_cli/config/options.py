"""The table of options: each row serves the commands, the environment, `sakd config show`, the API and completion.

To add an option, add a row. A row with a `key` sets that key of the config, and `SAKD_` + its name does so from the
environment; a row without one is an argument of the command alone.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

TRAIN = "pretrain-teacher distill"
NETWORKS = "distill eval bench"
IMAGES = f"{TRAIN} eval import-weights inspect-spots"
SETTINGS = f"{IMAGES} sweep export"
PLACES = f"{TRAIN} eval predict sweep export inspect-spots runs report watch"
MACHINE = f"{TRAIN} eval predict sweep import-weights inspect-spots bench"
_SHOWN = "list show-method show-router show-key show-schema config-show"
DOCUMENTS = f"{SETTINGS} predict bench data-check {_SHOWN} compare report runs"


class Option(NamedTuple):
    """One option.

    name      of the parameter; the option is `--` + the name with hyphens, unless `flags` says otherwise
    key       of the config that it sets; empty: none
    commands  that have it, with blanks between them
    type      of the value that the command gets; text is read by the config
    complete  kind of `sakd list` whose names the shell completes
    default   of an option without a key; `...`: the option is required
    """

    name: str
    key: str
    help: str
    commands: str
    metavar: str | None = None
    type: Any = str | None
    complete: str = ""
    least: int | None = None
    default: Any = None
    flags: str = ""
    panel: str = ""

    @property
    def flag(self) -> str:
        return self.flags.partition(" ")[0] or f"--{self.name.rstrip('_').replace('_', '-')}"

    @property
    def variable(self) -> str:
        return f"SAKD_{self.name.upper()}"


# What `--protocol` sets, each unless another option says otherwise; published: by Song et al. (IEEE TIP 2022).
PROTOCOLS: dict[str, dict[str, Any]] = {
    "honest": {"data.validation": 0.1},
    "published": {"data.validation": 0.0, "seed": 1029, "router.recipe": "published"},
}
SWITCH, FLAG, TEXTS, FILE = bool | None, bool, list[str] | None, Path | None
# fmt: off
_ROWS: list[Option | str] = [
    "Distillation",
    Option("teacher", "teacher.source", "Teacher: architecture (its newest finished run), run directory or file; "
           "repeat it for several", NETWORKS, "TEACHER", TEXTS, "models"),
    Option("teacher_weights", "teacher.weights", "Weights file of the teacher, sakd's or its library's; or `library`",
           "distill eval", "FILE|library"),
    Option("student", "student", "Network to train", "distill bench", "NAME", complete="models"),
    Option("model", "model", "Network to pretrain", "pretrain-teacher", "NAME", complete="models"),
    Option("method", "method.name", "Distillation method, as in `sakd list methods`", "distill bench", "NAME",
           complete="methods"),
    Option("temperature", "method.temperature", "Softmax temperature of the logit loss (default: the method's)",
           "distill", "T"),
    Option("loss_weight", "method.weight", "Weight of the feature loss (default: the method's); auto: balanced",
           "distill", "WEIGHT|auto"),
    Option("dfa_weights", "method.weights", "Mixtures of method dfa: search, uniform, last, random or a dfa.json",
           "distill", "FILE|NAME"),
    Option("router", "router.name", "Where to distill, as in `sakd list routers`", "distill", "NAME",
           complete="routers"),
    Option("residual_students", "residual.students", "Lighter networks to train afterwards on the remaining error",
           "distill", "N"),
    Option("pretrain", "teacher.pretrain", "Train the teacher first if it has no finished run", "distill", type=SWITCH),
    Option("cache_teacher", "teacher.cache", "Cache the teacher's outputs on disk for later runs (kd, crd, rkd...)",
           "distill", type=SWITCH),
    Option("allow_teacher_mismatch", "teacher.allow_mismatch", "Accept a teacher whose accuracy differs from its card",
           "distill", type=SWITCH),
    Option("student_friendly", "friendly.students", "Train jointly with branches of this student; may be repeated",
           "pretrain-teacher", "NAME", TEXTS, "models"),
    Option("network", "", "Network or published teacher (default: by FILE's name, as resnet56_vanilla)",
           "import-weights", "NAME", complete="models", flags="--model"),
    Option("key", "", "Which weights, where FILE holds several: state_dict_ema, module.student ...", "import-weights",
           "KEY"),
    Option("class_order", "", "Classes in the order of FILE's logits: a text file, one a line, or JSON",
           "import-weights", "FILE", FILE, flags="--classes"),
    Option("protocol", "", "Either honest: held-out images choose; or published: the test set, seed 1029, prior 10",
           f"{TRAIN} sweep config-show", "NAME", type=Literal["honest", "published"] | None),
    "Series",
    Option("with_control", "", "Also run what a claim needs: coins of its rates, always, always balanced, never",
           "distill", type=FLAG),
    Option("routers", "", "Run each of these routers under one budget and compare them", "distill", "NAME,...|all"),
    Option("seeds", "", "Run N seeds, starting at --seed, and report mean and standard deviation", "distill", "N",
           int | None, least=1),
    Option("parallel", "", "Run all members of a series at once, each in its own process", "distill", type=FLAG),
    Option("baseline", "", "Compare every group with this one: a run, or words of its label (always, 'fitnet never')",
           "compare distill sweep", "RUN|WORDS"),
    "Selection",
    Option("methods", "", "Only these methods", "sweep", "NAME,..."),
    Option("pairs", "", "Only these pairs", "sweep", "TEACHER:STUDENT,..."),
    Option("some_routers", "", "Only these routers", "sweep", "NAME,...", flags="--routers"),
    Option("seed_count", "", "Number of seeds", "sweep", "N", int | None, least=1, flags="--seeds"),
    Option("budget", "", "Shorten every schedule in proportion: 0.1, 10% or 24 (epochs)", "sweep", "FRACTION|EPOCHS"),
    "Training",
    Option("epochs", "train.epochs", "Passes over the training images", TRAIN, "N"),
    Option("batch_size", "train.batch_size", "Images per step", f"{TRAIN} bench", "N"),
    Option("lr", "train.lr", "Initial learning rate (default: the network's, 0.05 or 0.01)", TRAIN, "RATE"),
    Option("milestones", "train.milestones", "Epochs at whose end the rate decays (default: 5/8, 6/8, 7/8 of all)",
           TRAIN, "N,..."),
    Option("seed", "seed", "Random seed", TRAIN, "N"),
    Option("head", "head", "Last layer of pretrained initial weights: keep it, or replace it by a fresh one", TRAIN,
           "keep|replace"),
    "Data",
    Option("dataset", "data.name", "Data set, as in `sakd list datasets` (default cifar100; of a run its own)", IMAGES,
           "NAME", complete="datasets"),
    Option("data_root", "data.root", "Folder of the data set's files", f"{SETTINGS} data-check", "DIR"),
    Option("manifest", "data.manifest", "With --dataset imagefolder: CSV file that lists path, label and perhaps split",
           f"{TRAIN} eval", "FILE.csv"),
    Option("validation", "data.validation", "Fraction of the training images to validate on; 0: use the test set",
           TRAIN, "FRACTION"),
    "Images",
    Option("live", "", "Measure now, with the networks of the last checkpoint", "inspect-spots", type=FLAG),
    Option("split", "", "Images to measure; other images than the run's own imply --live", "inspect-spots",
           type=Literal["train", "validation", "test"], default="train"),
    Option("eval_split", "", "Images to score: train, val, test or all (default: test; of another --data-root, all)",
           "eval", type=Literal["train", "val", "test", "all"] | None, flags="--split"),
    Option("probe", "", "Measure whether there is anything to route: what distilling single images does for others",
           "inspect-spots", type=FLAG),
    Option("sample", "", "Sample the decisions once instead of using probabilities", "inspect-spots", type=FLAG),
    Option("sample_seed", "", "Random seed of --sample", "inspect-spots", "N", int, least=0, default=0, flags="--seed"),
    "Ensemble",
    Option("early_exit", "", "Let images exit early where the thresholds allow it, as by default", "eval", type=FLAG),
    Option("always_on", "", "Pass every image through all members", "eval predict", type=FLAG),
    Option("curve", "", "Also report accuracy and cost over all thresholds", "eval", type=FLAG),
    "Configuration",
    Option("task", "", "Command whose configuration to show", "config-show", type=Literal["distill", "pretrain"],
           default="distill"),
    Option("preset", "", "Complete configuration by name, as in `sakd list presets`", f"{TRAIN} eval config-show",
           "NAME", complete="presets"),
    Option("config", "", "YAML file with a complete or partial configuration",
           f"{TRAIN} eval inspect-spots config-show", "FILE", FILE),
    Option("set_", "", "Set any key of the configuration, such as data.limit=1000; may be repeated",
           f"{SETTINGS} bench data-check config-show", "KEY=VALUE", TEXTS),
    "Run",
    Option("runs_dir", "runs_dir", "Folder of the run directories", PLACES, "DIR"),
    Option("run_dir", "", "Write the run to exactly this directory", TRAIN, "DIR", FILE),
    Option("resume", "", "Resume a run bit for bit (--epochs N: extend it); auto: the newest of these settings",
           TRAIN, "auto|RUN"),
    Option("overwrite", "", "With --run-dir: replace an existing run", TRAIN, type=FLAG),
    Option("device", "device", "Device: auto, cpu, cuda, cuda:1 or mps", MACHINE, "DEVICE"),
    Option("precision", "runtime.precision", "Precision of the networks", f"{TRAIN} sweep bench", "auto|fp32|bf16"),
    Option("compile", "runtime.compile", "Compile the step into one graph", f"{TRAIN} bench", type=SWITCH),
    Option("deterministic", "runtime.deterministic", "Bit-identical results from the same seed on a GPU as well", TRAIN,
           type=SWITCH),
    Option("sync_batchnorm", "runtime.sync_batchnorm", "Under torchrun: synchronize BatchNorm across processes", TRAIN,
           type=SWITCH),
    Option("global_batch", "runtime.global_batch", "Under torchrun: losses between samples use the global batch",
           "distill", type=SWITCH),
    Option("log", "log", "Also log to csv, mlflow, tensorboard, wandb: in the run directory", TRAIN, "NAME,..."),
    Option("dry_run", "", "Build everything and try one real batch; write nothing", TRAIN, type=FLAG),
    Option("eval_batch_size", "batch_size", "Images per forward pass", "eval predict", "N", flags="--batch-size"),
    Option("rounds", "", "Number of timings of each step", "bench", "N", int, least=1, default=7),
    Option("scaling", "", "Also time along one axis: batch, side, spots, images, bank, depth or runs", "bench", "AXIS"),
    Option("jobs", "", "Runs at a time (default: 1, or one per GPU)", "sweep", "N", int | None, least=1),
    Option("jobs_per_gpu", "", "Runs that share a GPU", "sweep", "N", int, least=1, default=1),
    Option("executor", "", "Where to run: this machine, a Ray cluster (sakd[ray]) or Slurm arrays (sakd[slurm])",
           "sweep", type=Literal["local", "ray", "slurm"], default="local"),
    Option("resource", "", "Ray: address, num_cpus, num_gpus, max_retries; Slurm: slurm_partition, timeout_min ...",
           "sweep", "KEY=VALUE", TEXTS),
    Option("retry_failed", "", "Retry runs that failed in an earlier call", "sweep", type=FLAG),
    Option("estimate", "", "Estimate runs, hours and bytes; write nothing", "sweep", type=FLAG, flags="--dry-run"),
    Option("measure", "", "With --dry-run: seconds to time steps for", "sweep", "SECONDS", float, default=60.0),
    "Selection of runs",
    Option("where", "", "Only runs with this setting or column, such as method.name=fitnet; may be repeated", "runs",
           "KEY=VALUE", TEXTS),
    Option("sort", "", "Sort by this column; with a hyphen before it the largest first: -top1", "runs", "COLUMN"),
    Option("yes", "", "With rm: remove without a question", "runs", type=FLAG),
    "Comparison",
    Option("compare", "", "Compare with an earlier --json of this machine", "bench", "FILE", FILE),
    Option("peer", "", "Time the step of another checkout beside ours; runs its code", "bench", "DIR", FILE),
    Option("peer_entry", "", "Function that builds the peer's step (see `sakd guide speed`)", "bench",
           "MODULE:FUNCTION", str, default="sakd_peer:step"),
    "Output",
    Option("format", "", "Format: safetensors with plain source, onnx, torch's pt2, or openvino", "export", "FORMAT",
           type=Literal["safetensors", "onnx", "pt2", "openvino"], default="safetensors"),
    Option("fp16", "", "Write 16-bit weights: half the size", "export", type=FLAG),
    Option("int8", "", "For onnx and openvino: 8-bit weights and activations, calibrated on training images", "export",
           type=FLAG),
    Option("max_drop", "", "Refuse a file whose top-1 is lower than the network's by more points", "export", "POINTS",
           float, default=1.0),
    Option("score_images", "", "Test images to score network and file on", "export", "N", int, least=1, default=2000,
           flags="--images"),
    Option("export_dir", "", "Folder to write (default: RUN/export-FORMAT)", "export", "DIR", FILE, flags="--out"),
    Option("replace", "", "Replace an existing export", "export", type=FLAG, flags="--overwrite"),
    Option("without_normalisation", "", "All but safetensors: take normalised pixels, not values between 0 and 1",
           "export", type=FLAG),
    Option("opset", "", "Opset of onnx, from 13 on where its operators allow (default: the exporter's)", "export",
           "N", int | None, least=13),
    Option("import_dir", "", "Folder to write (default: MODEL-DATASET, here)", "import-weights", "DIR", FILE,
           flags="--out"),
    Option("page", "", "HTML file to write (default: RUN/report.html)", "report", "FILE", FILE, flags="--out"),
    Option("origin", "", "Show who set each key", "config-show", type=FLAG),
    Option("describe", "", "Show what each key means", "config-show", type=FLAG),
    Option("top_classes", "", "Number of classes for each picture, the likeliest first", "predict", "K", int, least=1,
           default=5, flags="--top"),
    Option("top", "", "Classes to show at each end", "inspect-spots", "N", int, least=1, default=10),
    Option("extremes", "", "Images to show at each end of each spot", "inspect-spots", "N", int, least=0, default=3),
    Option("plot", "", "Write the plots to this .png or .svg file; needs matplotlib", "eval compare inspect-spots",
           "FILE", FILE),
    Option("confusion", "", "Write the full confusion matrix to this .csv, .png or .svg file", "eval", "FILE", FILE),
    Option("panel", "", "Only this panel of --plot", "inspect-spots",
           type=Literal["epochs", "classes", "difficulty", "paths"] | None),
    Option("html", "", "Write everything to one HTML file", "inspect-spots", "FILE", FILE),
    Option("samples", "", "Write one record per image, .jsonl or .csv", "inspect-spots", "FILE", FILE),
    Option("csv", "", "Print the results as CSV to stdout", "predict compare sweep inspect-spots", type=FLAG),
    Option("markdown", "", "Also write the table as Markdown", "sweep", "FILE", FILE),
    Option("json", "", "Print exactly one JSON document to stdout", DOCUMENTS, type=FLAG),
    Option("quiet", "", "Print no log messages and no progress to stderr, only errors",
           f"{SETTINGS} predict bench data-check report", type=FLAG, flags="--quiet -q"),
]
# fmt: on
OPTIONS: dict[str, Option] = {}
for row in _ROWS:  # a text is the panel of the rows below it
    if isinstance(row, str):
        panel = row
    else:
        OPTIONS[row.name] = row._replace(panel=panel)


def options_of(command: str) -> dict[str, Option]:
    """The rows of a command. `config-show` has all those that set a key in a training."""
    trained = {*TRAIN.split()}
    return {
        name: row
        for name, row in OPTIONS.items()
        if command in (has := row.commands.split()) or (command == "config-show" and row.key and trained & {*has})
    }
