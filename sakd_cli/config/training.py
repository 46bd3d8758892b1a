"""The config of a whole run: what `config.yaml` of a run directory has and what the command line makes."""

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

from sakd_cli.config import routers
from sakd_cli.config.base import Config
from sakd_cli.config.datasets import CIFAR100Config, Data
from sakd_cli.config.methods import FitNetConfig, Method
from sakd_cli.config.networks import NetworkName, of_library
from sakd_cli.config.sweep import SweepConfig
from sakd_cli.config.train import Share, Train
from sakd_cli.files import expanded

Loggers = Annotated[tuple[Literal["csv", "mlflow", "tensorboard", "wandb"], ...], Field(min_length=1)]
Folder = Annotated[Path, AfterValidator(expanded)]
# `library`: what torchvision or timm has trained; a folder of that name is ./library.
Weights = Literal["library"] | Folder
# A trained network to start from: a quarter of the epochs, at a fifth of the rate (as Park et al., NeurIPS 2021).
FINE_TUNING = {"epochs": 60, "lr": 0.01}
EXITS = ("rule", "delta", "theta", "budget", "uncertainty")


def _each_once(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(names)}: a student is named twice")
    return names


class Runtime(Config):
    """How a run computes; none of it changes what is computed, beyond rounding."""

    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Number type of the networks, fp32 or bf16, losses being fp32; auto: bf16 on a GPU that has it, else fp32."""
    tf32: bool = False
    """On CUDA: compute fp32 products and convolutions from 10-bit mantissas (TF32): faster, and no longer exact."""
    shapes: Literal["auto", "static", "dynamic"] = "auto"
    """dynamic: the routed pass skips what would be multiplied by 0 (exact); static: it does not; auto: by device."""
    channels_last: Literal["auto"] | bool = "auto"
    """Memory format of maps, channels innermost or not; auto: on a CPU and on CUDA."""
    compile: Literal["auto"] | bool = "auto"
    """Compile the step (torch.compile), which takes minutes once; auto: on CUDA, from 50,000 steps on."""
    deterministic: bool = False
    """Same bits from the same seed on a GPU too, at some cost of speed; a CPU is deterministic anyway."""
    sync_batchnorm: bool = False
    """Under torchrun: BatchNorm statistics are those of the global batch; off as in PyTorch's DDP."""
    global_batch: bool = False
    """Under torchrun: losses between samples (sp, rkd, pkt, cc, dist) compare the global batch, not each process's."""
    look_ahead: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)] = "auto"
    """Steps whose images the teacher sees in one pass in advance; auto: 8 on CUDA (measured), else 1."""
    graph: Literal["auto"] | bool = "auto"
    """Replay the step as one CUDA graph; no effect elsewhere; auto: yes, where it can be captured."""

    @model_validator(mode="after")
    def _a_graph_has_fixed_shapes(self) -> "Runtime":
        if True in (self.compile, self.graph) and self.shapes == "dynamic":
            raise ValueError("a compiled or captured step needs static shapes, not dynamic ones")
        return self


class FriendlyConfig(Config):
    """Student branches on a teacher in training (Park et al., NeurIPS 2021); the defaults are the paper's."""

    students: Annotated[tuple[NetworkName, ...], Field(min_length=1), AfterValidator(_each_once)]
    """Networks whose tails are attached to the teacher; the losses are averaged over all branches."""
    lambda_t: NonNegativeFloat = 1.0
    """Weight of the teacher's cross-entropy."""
    lambda_kl: NonNegativeFloat = 3.0
    """Weight of the KL divergence between teacher and branches."""
    lambda_ce: NonNegativeFloat = 1.0
    """Weight of the branches' own cross-entropy."""
    tau: PositiveFloat = 1.0
    """Softmax temperature of the KL divergence."""
    kl: Literal["forward", "reverse"] = "forward"
    """Direction of the divergence: forward is KL(teacher || branch), reverse is KL(branch || teacher)."""
    share_branches: bool = False
    """One student serves all its branches; otherwise each branch has its own."""
    detach_target: bool = False
    """Stop the gradient of the KL divergence at the teacher's logits."""
    detach_features: bool = False
    """Stop the branches' gradient at the teacher's maps; an ablation, which removes the point of the method."""


class ResidualConfig(Config):
    """Residual students (ResKD, Li et al., IEEE TIP 2021): lighter networks, trained on the remaining error."""

    students: NonNegativeInt = 0
    """Number of residual students at most; 0: the student without any."""
    architectures: Annotated[
        tuple[NetworkName, ...] | None, BeforeValidator(lambda value: None if value in ("auto", ["auto"]) else value)
    ] = None
    """One network each, or one for all; null or auto: the largest of the family within ratio of the one before."""
    ratio: PositiveFloat = 0.7
    """Largest MACs of an automatic residual student, as a fraction of the network before it; this project's choice."""
    loss: Literal["kl", "mse", "inner"] = "kl"
    """kl: (1 - alpha) CE + alpha T^2 KL of the summed logits; mse: the missing logits; inner: the run's own method."""
    alpha: Share = 0.9
    """Weight of the KL term of loss kl; 0.9 as in RepDistiller."""
    temperature: PositiveFloat = 4.0
    """Softmax temperature of loss kl; 4 as in RepDistiller."""
    init: Literal["default", "zero"] = "default"
    """zero: the last layer starts at zero, so that a residual student changes nothing at first."""
    max_cost: PositiveFloat = 0.6
    """Largest MACs of all members, as a fraction of the teacher's; this project's choice."""
    energy: NonNegativeFloat = 0.02
    """Relative energy of the missing logits below which no further student is trained; this project's choice."""
    min_gain: float = 0.02
    """Fraction by which a residual student must lower that energy to be used; this project's choice."""
    calibration: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """Fraction of the training images that no student sees: they decide when to stop and when images exit."""
    calibration_min: PositiveInt = 500
    """Least number of calibration images, though never more than a fifth of the training images."""
    rule: Literal["agreement", "accuracy", "fixed", "budget"] = "agreement"
    """How exit thresholds are fitted: agreement or accuracy, up to delta; fixed: theta; budget: mean cost."""
    delta: Share = 0.01
    """Largest loss of agreement or accuracy that early exit may cost, as a fraction of the images."""
    theta: Share = 0.5
    """Exit threshold of rule fixed."""
    budget: PositiveFloat = 0.5
    """Mean cost of rule budget, as a fraction of the teacher's MACs."""
    uncertainty: Literal["entropy", "maxprob", "margin", "energy"] = "entropy"
    """What is compared with the threshold: entropy, maxprob, margin or energy of the logits, in [0, 1]."""

    def set_aside(self, images: int) -> float:
        """Fraction of so many training images that do not train any student."""
        return max(self.calibration, min(self.calibration_min / images, 0.2)) if self.students else 0.0

    @model_validator(mode="after")
    def _one_name_per_student(self) -> "ResidualConfig":
        if self.architectures is not None and len(self.architectures) not in (1, self.students):
            named = f"{len(self.architectures)} architectures are named for {self.students} residual students"
            raise ValueError(f"{named}: one each, or one for all")
        return self

    def exits(self) -> dict[str, Any]:
        """The settings of early exit, which need no training."""
        return self.model_dump(include={*EXITS})


class RunConfig(Config):
    """What every run has."""

    task: str
    """What the run does: pretrain or distill; set by the command."""
    data: Data = CIFAR100Config()
    """Data set: its name, or a mapping with its settings."""
    train: Train = Train()
    """Optimizer and schedule."""
    seed: NonNegativeInt = 0
    """Random seed of initialisation, order, augmentation and routing noise, each with a generator of its own."""
    device: str = "auto"
    """Where to compute: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""
    runs_dir: Folder = Path("runs")
    """Folder in which run directories are made."""
    log: Loggers | None = None
    """Also log to csv, mlflow, tensorboard or wandb, or several of them; null: only the run's own logs."""
    log_every: PositiveInt = 50
    """Optimizer steps between two lines of metrics."""
    save_every: PositiveInt | None = None
    """Optimizer steps between two checkpoints inside an epoch; null: at ends of epochs only."""
    runtime: Runtime = Runtime()
    """How the run computes, not what."""
    code: tuple[str, ...] | None = None
    """SHA-256 and path of every file of one's own code that the settings name; filled in when a run begins."""


class PretrainConfig(RunConfig):
    """Train one network with cross-entropy: a teacher, or a student without one."""

    task: Literal["pretrain"] = "pretrain"
    model: NetworkName
    """Network to train."""
    friendly: FriendlyConfig | None = None
    """Students whose branches are trained with the network (SFTN); null: plain training."""
    init_from: Weights | None = None
    """Run directory or weights file to fine-tune, or `library` (torchvision, timm): 60 epochs at lr 0.01 unless set."""
    head: Literal["keep", "replace"] = "keep"
    """Last layer that comes with init_from: keep it, or replace it by a fresh one."""

    @model_validator(mode="before")
    @classmethod
    def _fine_tuning_is_short_and_slow(cls, values: Any) -> Any:
        train = values.get("train", {}) if isinstance(values, dict) and values.get("init_from") is not None else None
        if not isinstance(train, dict):
            return values
        return values | {"train": FINE_TUNING | {key: value for key, value in train.items() if value is not None}}


def _source(value: Any) -> Any:
    several = isinstance(value, list | tuple) and len(value) > 1
    return {"source": value} if isinstance(value, str) or several else value


class TeacherConfig(Config):
    """The network to learn from."""

    source: Annotated[str, Field(min_length=1)]
    """An architecture (its newest finished run), a run directory or a weights file."""
    pretrain: bool = False
    """Train the teacher first if it has no finished run."""
    epochs: PositiveInt | None = None
    """Epochs of that training; null: as many as the student's."""
    weights: Weights | None = None
    """Weights file that source stood for when the run began, or one to use; `library`: what the libraries trained."""
    sha256: str | None = None
    """SHA-256 of that file; a resumed or repeated run uses these weights and no newer ones."""
    others: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Further teachers, each named as source is; --teacher may be repeated."""
    other_weights: tuple[Folder, ...] | None = None
    """Their weights files."""
    other_sha256: tuple[str, ...] | None = None
    """SHA-256 of these files when the run began."""
    logits: Folder | None = None
    """Safetensors file with the teacher's `logits` of every training image, in place of a network (kd, dkd, ...)."""
    combine: Literal["mean", "confidence", "draw"] = "mean"
    """Several teachers: mean; confidence: less of those that are wrong about a sample (CA-MKD); draw: one per step."""
    cache: bool = False
    """Cache the teacher's outputs for every view of every image on disk, for this run and later ones."""
    allow_mismatch: bool = False
    """Accept a teacher whose accuracy differs from the one on its teacher card."""

    @model_validator(mode="before")
    @classmethod
    def _weights_say_whose_they_are(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("logits") is not None and values.get("source") is None:
            return values | {"source": str(values["logits"])}
        if isinstance(values, dict) and values.get("weights") is not None and values.get("source") is None:
            return values | {"source": str(values["weights"])}
        if isinstance(values, dict) and isinstance(values.get("source"), list | tuple):
            first, *others = [str(source) for source in values["source"]] or [""]
            return values | {"source": first, "others": others or values.get("others", ())}
        return values

    @model_validator(mode="after")
    def _one_is_not_combined(self) -> "TeacherConfig":
        if not self.others and self.combine != "mean":
            raise ValueError(f"combine {self.combine} is of several teachers, and one is named")
        return self

    @property
    def each_other(self) -> "list[TeacherConfig]":
        """Every further teacher as the only one; `library` counts for each that is of one."""
        alone = {"others": (), "other_weights": None, "other_sha256": None, "pretrain": False}
        open_ = (None,) * len(self.others)
        weights: list[Any] = [*(self.other_weights or open_)]
        if self.weights == "library":
            weights = [b or ("library" if of_library(a) else None) for a, b in zip(self.others, weights, strict=True)]
        named = zip(self.others, weights, self.other_sha256 or open_, strict=True)
        return [self.model_copy(update=alone | {"source": a, "weights": b, "sha256": c}) for a, b, c in named]


# Settings of a distillation about its student, which a pretraining does not have.
STUDENT_KEYS = ("student", "method", "router", "stage_map", "init_from_branches", "residual", "student_weights", "head")


class DistillConfig(RunConfig):
    """Train a student from a frozen teacher."""

    task: Literal["distill"] = "distill"
    teacher: Annotated[TeacherConfig, BeforeValidator(_source)]
    """Teacher: a name, a path, or a mapping with its settings."""
    student: NetworkName
    """Network to train."""
    method: Method = FitNetConfig()
    """Distillation method: its name, or a mapping with its settings."""
    router: routers.Router = routers.AdaptiveConfig()
    """Where to distill: the router's name, or a mapping with its settings."""
    stage_map: tuple[tuple[PositiveInt, PositiveInt], ...] | None = None
    """Pairs [student stage, teacher stage] to match; null: by order, or by stride where the stage counts differ."""
    student_weights: Weights | None = None
    """Weights that the student starts with, as init_from of a pretraining; null: random."""
    head: Literal["keep", "replace"] = "keep"
    """Last layer that comes with student_weights: keep it, or replace it by a fresh one."""
    init_from_branches: bool = False
    """Start the student with the longest branch that its student-friendly teacher was trained with."""
    residual: ResidualConfig = ResidualConfig()
    """Lighter students trained afterwards on the remaining error (ResKD)."""

    @field_validator("router")
    @classmethod
    def _something_is_learned(cls, router: routers.RouterConfig, info: ValidationInfo) -> routers.RouterConfig:
        named = 1 + len(getattr(info.data.get("teacher"), "others", ()))
        if named > 1 and isinstance(router, routers.AgreementConfig | routers.MetaConfig | routers.RandomMatchedConfig):
            raise ValueError(f"{router.name} is of one teacher, and {named} are named")
        method = info.data.get("method")
        if isinstance(router, routers.TrainedConfig) and (train := info.data.get("train")) is not None:
            router.trained(train)
        if isinstance(router, routers.NeverConfig) and method is not None and not method.ce_weight:
            raise ValueError(
                f"{router.name} leaves only the cross-entropy, and method {method.name} has it with factor 0: "
                "nothing would be learned; --set method.ce_weight=1"
            )
        if isinstance(router, routers.FixedConfig) and method is not None and method.balance and router.scales:
            raise ValueError(
                "weights between 0 and 1 cancel at feature spots whose dose is balanced; --set method.balance=... says "
                "how much, and a weight of 0 or 1 where"
            )
        return router

    @model_validator(mode="after")
    def _a_meta_router_is_of_one_student(self) -> "DistillConfig":
        if isinstance(self.router, routers.MetaConfig) and self.residual.students:
            raise ValueError(f"router {self.router.name} has images set aside for one student, not for residual ones")
        return self

    @property
    def learned(self) -> routers.LearnedConfig | None:
        """The router's settings, where it learns from the routed network."""
        return self.router if isinstance(self.router, routers.LearnedConfig) else None

    @property
    def aside(self) -> ResidualConfig | routers.MetaConfig:
        """What says how many of the training images are set aside."""
        return self.router if isinstance(self.router, routers.MetaConfig) else self.residual

    def pretraining(self) -> dict[str, Any]:
        """The settings of the run that trains this run's teacher."""
        settings = self.model_dump(mode="json", exclude={"task", "teacher", *STUDENT_KEYS})
        settings["data"]["unlabeled"] = None
        return settings | {
            "model": self.teacher.source,
            "train": self.train.for_another().model_dump(mode="json")
            | ({"epochs": self.teacher.epochs} if self.teacher.epochs else {}),
        }


class EvalConfig(Config):
    """Score a network on the test images of a data set."""

    data: Data = CIFAR100Config()
    """Data set: its name, or a mapping with its settings."""
    residual: ResidualConfig = ResidualConfig()
    """Early-exit settings of an ensemble; other ones than the run's fit the thresholds anew."""
    teacher: Annotated[TeacherConfig | None, BeforeValidator(_source)] = None
    """Network to compare with; null: none."""
    batch_size: PositiveInt = 1000
    """Images per forward pass."""
    timing_seconds: NonNegativeFloat = 1.0
    """Seconds for which latency and throughput are measured, each; 0: not at all."""
    timing_batch: PositiveInt = 128
    """Images per forward pass for the throughput."""
    device: str = "auto"
    """Where to compute: auto (CUDA, then MPS, then CPU), cpu, cuda, cuda:1 or mps."""
    runs_dir: Folder = Path("runs")
    """Folder of the run directories."""


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
