"""The options of the calls of `sakd_cli.api`, typed: those of the commands of the same names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from sakd_cli.engine.reporter import Reporter

Place = str | Path
Own = Any  # a name, or a class, a function or an object of your own
# fmt: off
_Common = TypedDict("_Common", {  # noqa: UP013
    "settings": Mapping[str, Any], "reporter": "Reporter", "trust": Sequence[str],
}, total=False)
Inputs = TypedDict("Inputs", {  # noqa: UP013
    "dataset": Own, "data_root": Place, "device": str, "runs_dir": Place, "settings": Mapping[str, Any],
    "reporter": "Reporter", "trust": Sequence[str],
}, total=False)
_Training = TypedDict("_Training", {  # noqa: UP013
    "epochs": int, "batch_size": int, "lr": float, "milestones": Sequence[int], "validation": float, "seed": int,
    "manifest": Place, "head": Literal["keep", "replace"], "precision": Literal["auto", "fp32", "bf16"],
    "compile": bool, "deterministic": bool, "sync_batchnorm": bool, "log": str | Sequence[str], "preset": str,
    "protocol": Literal["honest", "published"],
    "config": Place, "run_dir": Place, "resume": Place, "overwrite": bool,
}, total=False)
_Distillation = TypedDict("_Distillation", {  # noqa: UP013
    "teacher": Own, "teacher_weights": Place, "student": Own, "method": Own, "router": Own, "temperature": float,
    "loss_weight": float | Literal["auto"], "dfa_weights": Place, "residual_students": int, "pretrain": bool,
    "cache_teacher": bool, "allow_teacher_mismatch": bool, "global_batch": bool,
}, total=False)
# fmt: on


class PretrainOptions(Inputs, _Training, total=False):
    """The options of `sakd pretrain-teacher`, and `settings` and `reporter`."""

    student_friendly: Sequence[str]


class PredictOptions(_Common, total=False):
    """The options of `sakd predict`."""

    runs_dir: Place
    device: str
    batch_size: int
    top: int
    always_on: bool


class ExportOptions(_Common, total=False):
    """The options of `sakd export`."""

    data_root: Place
    runs_dir: Place
    format: Literal["safetensors", "onnx", "pt2", "openvino"]
    fp16: bool
    int8: bool
    max_drop: float
    images: int
    out: Place
    overwrite: bool
    with_normalisation: bool
    opset: int


class ImportOptions(_Common, total=False):
    """The options of `sakd import-weights`."""

    model: Own
    key: str
    classes: Place
    dataset: Own
    data_root: Place
    device: str
    out: Place


class BenchOptions(_Common, total=False):
    """The options of `sakd bench`."""

    teacher: Own
    student: Own
    method: Own
    batch_size: int
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    compile: bool
    rounds: int
    scaling: str
    compare: Place
    peer: Place
    peer_entry: str


class SweepOptions(_Common, total=False):
    """The options of `sakd sweep`."""

    methods: str
    pairs: str
    routers: str
    seeds: int
    budget: str
    data_root: Place
    runs_dir: Place
    device: str
    precision: Literal["auto", "fp32", "bf16"]
    jobs: int
    jobs_per_gpu: int
    executor: Literal["local", "ray", "slurm"]
    resource: Sequence[str]
    retry_failed: bool
    baseline: str
    protocol: Literal["honest", "published"]


class DistillOptions(Inputs, _Training, _Distillation, total=False):
    """The options of `sakd distill`, and `settings` and `reporter`."""
