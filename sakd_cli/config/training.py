"""One whole run in words: what `config.yaml` of a run directory holds and what the command line makes."""

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sakd_cli.config.base import Config
from sakd_cli.config.datasets import CIFAR100Config, Data
from sakd_cli.config.friendly import FriendlyConfig
from sakd_cli.config.methods import FitNetConfig, Method
from sakd_cli.config.networks import NetworkName
from sakd_cli.config.residual import ResidualConfig
from sakd_cli.config.routers import AdaptiveConfig, NeverConfig, Router, RouterConfig
from sakd_cli.config.sweep import SweepConfig
from sakd_cli.files import expanded

Folder = Annotated[Path, AfterValidator(expanded)]
# `library`: what torchvision or timm has trained; a folder of that name is ./library.
Weights = Literal["library"] | Folder
# A trained network to start from: a quarter of the epochs, at a fifth of the rate (as Park et al., NeurIPS 2021).
FINE_TUNING = {"epochs": 60, "lr": 0.01}
# Config that may change between two parts of one run: where it works, not what it computes.
FREE = {"device", "runs_dir", "log", "log_every", "save_every", "data.workers"}
FREE |= {"teacher.pretrain", "teacher.cache", "teacher.allow_mismatch"}
# These and how the teacher is named: two runs are the same wherever it lies, for it is known by its SHA-256.
LOCATIONS = FREE | {"teacher.weights", "teacher.source", "teacher.epochs"}


class Train(Config):
    """SGD as the field trains CIFAR networks.

    epochs, batch_size
    lr            None: 0.05, or the network's own (0.01 for MobileNetV2 and ShuffleNet)
    momentum, weight_decay; nesterov: the momentum's look ahead
    milestones    epochs after which lr is multiplied by lr_decay; None: 5/8, 6/8 and 7/8 of all (150, 180, 210 of 240)
    """

    epochs: PositiveInt = 240
    batch_size: PositiveInt = 64
    lr: PositiveFloat | None = None
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    nesterov: bool = False
    milestones: tuple[PositiveInt, ...] | None = None
    lr_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1

    @model_validator(mode="after")
    def _milestones_fit(self) -> "Train":
        steps = self.milestones or ()
        if list(steps) != sorted(set(steps)):
            raise ValueError(f"milestones {list(steps)} must rise")
        if steps and steps[-1] >= self.epochs:
            raise ValueError(f"milestone {steps[-1]} must come before the last epoch ({self.epochs})")
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self

    def decay_epochs(self) -> tuple[int, ...]:
        """Epochs (counted from 1) after which the learning rate falls."""
        if self.milestones is not None:
            return self.milestones
        return tuple(sorted({self.epochs * eighth // 8 for eighth in (5, 6, 7)} - {0}))


class Runtime(Config):
    """How a run computes, not what.

    precision      of the networks: fp32, or bf16 for their products and convolutions; all else stays in fp32
    shapes         dynamic: the routed pass leaves out what would be multiplied by 0 (exact, but the host must read
                   the gates); static: it does not; auto: dynamic on a CPU unless compiled
    channels_last  whether maps have their channels innermost; auto: on a CPU and on CUDA
    compile        the step as one compiled graph, and on CUDA as one launch
    deterministic  the same bits from the same seed on a GPU too, for some speed; a CPU gives them anyway
    sync_batchnorm, gather   where several processes share a batch: BatchNorm's statistics are of all of it; losses
                   between samples (sp, rkd, pkt, cc, dist) compare all of it, not each process's part
    look_ahead     steps whose images the teacher sees in one pass in front of them (exact, but for a convolution's last
                   bits); 1: each step its own; auto: 8 on CUDA, else 1
    graph          on CUDA: a step's forward, backward and update as one launch, without a compiler; nothing elsewhere
    """

    precision: Literal["fp32", "bf16"] = "fp32"
    shapes: Literal["auto", "static", "dynamic"] = "auto"
    channels_last: Literal["auto"] | bool = "auto"
    compile: bool = False
    deterministic: bool = False
    sync_batchnorm: bool = False
    global_batch: bool = False
    look_ahead: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    graph: bool = False

    @model_validator(mode="after")
    def _a_graph_has_fixed_shapes(self) -> "Runtime":
        if (self.compile or self.graph) and self.shapes == "dynamic":
            raise ValueError("a compiled or captured step needs static shapes, not dynamic ones")
        return self


class RunConfig(Config):
    """What every run has.

    seed       of initialisation, order, augmentation and routing noise; each draws from a stream of its own
    device     auto, cpu, cuda, cuda:1, mps
    runs_dir   folder in which run directories are made
    log        tensorboard: the same figures for TensorBoard, in the run directory; None: only the run's own logs
    log_every  steps between two lines of metrics
    save_every steps between two checkpoints inside an epoch; None: only at its end
    """

    task: str
    data: Data = CIFAR100Config()
    train: Train = Train()
    seed: NonNegativeInt = 0
    device: str = "auto"
    runs_dir: Folder = Path("runs")
    log: Literal["tensorboard"] | None = None
    log_every: PositiveInt = 50
    save_every: PositiveInt | None = None
    runtime: Runtime = Runtime()


class PretrainConfig(RunConfig):
    """Train one network with cross-entropy: a teacher, or a student alone.

    friendly   students for whom it is made easy to learn from; None: for nobody
    init_from  run directory or weights file to start from, or `library`: fine-tuning, 60 epochs with lr 0.01 unless
               these are set
    head       what becomes of the last layer that comes with it: keep, or replace by a fresh one
    """

    task: Literal["pretrain"] = "pretrain"
    model: NetworkName
    friendly: FriendlyConfig | None = None
    init_from: Weights | None = None
    head: Literal["keep", "replace"] = "keep"

    @model_validator(mode="before")
    @classmethod
    def _fine_tuning_is_short_and_slow(cls, words: Any) -> Any:
        train = words.get("train", {}) if isinstance(words, dict) and words.get("init_from") is not None else None
        if not isinstance(train, dict):
            return words
        return words | {"train": FINE_TUNING | {key: value for key, value in train.items() if value is not None}}


def _source(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


class TeacherConfig(Config):
    """Whom to learn from.

    source    an architecture (its newest finished run), a run directory or a weights file
    pretrain  train it first if no finished run is there
    epochs    of that training; None: as many as the student's
    weights   where `source` led when the run began, or which file to take, and its SHA-256; a resumed or repeated run
    sha256    takes these and no newer ones. For a network of torchvision or timm also a file under their names
    bank      keep its answers to every view of every image on the disk, for this run and later ones
    allow_mismatch  take it also where it scores otherwise than its card says
    """

    source: Annotated[str, Field(min_length=1)]
    pretrain: bool = False
    epochs: PositiveInt | None = None
    weights: Folder | None = None
    sha256: str | None = None
    cache: bool = False
    allow_mismatch: bool = False

    @model_validator(mode="before")
    @classmethod
    def _weights_say_whose_they_are(cls, words: Any) -> Any:
        if isinstance(words, dict) and words.get("weights") is not None and words.get("source") is None:
            return words | {"source": str(words["weights"])}
        return words


# What a distillation says of its student, and a pretraining does not know.
STUDENT_KEYS = (
    *("student", "method", "router", "stage_map", "init_from_branches", "residual"),
    *("student_weights", "head"),
)


class DistillConfig(RunConfig):
    """Train a student from a frozen teacher.

    stage_map  pairs [student stage, teacher stage] of maps that belong together; None: by order, or by stride where the
               networks have different numbers of stages
    student_weights  what the student starts with, as `init_from` of a pretraining, and `head` as there
    init_from_branches  the student starts with the longest tail that its student-friendly teacher was trained with
    """

    task: Literal["distill"] = "distill"
    teacher: Annotated[TeacherConfig, BeforeValidator(_source)]
    student: NetworkName
    method: Method = FitNetConfig()
    router: Router = AdaptiveConfig()
    stage_map: tuple[tuple[PositiveInt, PositiveInt], ...] | None = None
    student_weights: Weights | None = None
    head: Literal["keep", "replace"] = "keep"
    init_from_branches: bool = False
    residual: ResidualConfig = ResidualConfig()

    @field_validator("router")
    @classmethod
    def _something_is_learned(cls, router: RouterConfig, info: ValidationInfo) -> RouterConfig:
        method = info.data.get("method")
        if isinstance(router, NeverConfig) and method is not None and not method.ce_weight:
            raise ValueError(
                f"{router.name} leaves only the cross-entropy, and method {method.name} has it with factor 0: "
                "nothing would be learned; --set method.ce_weight=1"
            )
        return router

    def pretraining(self) -> dict[str, Any]:
        """The words of the run that trains this run's teacher."""
        words = self.model_dump(mode="json", exclude={"task", "teacher", *STUDENT_KEYS})
        return words | {
            "model": self.teacher.source,
            "train": words["train"] | ({"epochs": self.teacher.epochs} if self.teacher.epochs else {}),
        }


class EvalConfig(Config):
    """Score a network on the test images of a data set.

    residual        for a student with residual students: other words for who leaves early fit the thresholds anew
    teacher         with whom it is compared; None: with nobody
    batch_size      images per forward pass
    timing_seconds  how long latency and throughput are measured, each; 0: they are not
    timing_batch    images per forward pass for the throughput
    """

    data: Data = CIFAR100Config()
    residual: ResidualConfig = ResidualConfig()
    teacher: Annotated[TeacherConfig | None, BeforeValidator(_source)] = None
    batch_size: PositiveInt = 1000
    timing_seconds: NonNegativeFloat = 1.0
    timing_batch: PositiveInt = 128
    device: str = "auto"
    runs_dir: Folder = Path("runs")


class Procedure(NamedTuple):
    """A kind of training.

    command  of the command line
    config   its settings; the field `task` has the procedure's name
    builder  "module:function" that makes a `runs.job.Job` of such a config; loaded when a run is built
    """

    command: str
    config: type[RunConfig]
    builder: str


# To add a kind of training: its config class above, the file of its builder, one line here.
PROCEDURES = {
    "pretrain": Procedure("pretrain-teacher", PretrainConfig, "sakd_cli.runs.build:pretraining"),
    "distill": Procedure("distill", DistillConfig, "sakd_cli.runs.build:distillation"),
}
TASKS: dict[str, type[Config]] = {name: procedure.config for name, procedure in PROCEDURES.items()}
TASKS |= {"eval": EvalConfig, "sweep": SweepConfig}
