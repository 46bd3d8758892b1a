"""`teacher.logits`: a file with the logits of every training image stands for the teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sakd_cli.batch import Batch
from sakd_cli.config.training import DistillConfig
from sakd_cli.data.dataset import Dataset
from sakd_cli.errors import UsageError, one_line
from sakd_cli.files import check_header, parse_json, sha256
from sakd_cli.models.artifact import Artifact, NetworkCard
from sakd_cli.models.layers import GlobalPool
from sakd_cli.models.staged import Features, StagedModel, StageInfo
from sakd_cli.runs.images import Images
from sakd_cli.tasks.distill import DistillTask

NAME = "logits"  # what stands for the network's name


@dataclass(frozen=True)
class SavedLogits:
    """Logits [images, classes] by place in the training split; called like a teacher's plain pass."""

    logits: Tensor

    def __call__(self, batch: Batch) -> Features:
        """The batch's; all that looks at a feature is refused before (`refusals.py`)."""
        found = self.logits[batch.index]
        return Features((found.new_empty(0), found.new_empty(0), found), found)


def artifact_of(path: Path, dataset: Dataset) -> Artifact:
    """In the place of a network: no more than the shape of one."""
    stages: list[tuple[StageInfo, nn.Module]] = [
        (StageInfo("stem", 1, 1), nn.Conv2d(3, 1, 1)),
        (StageInfo("stage1", 1, 1), nn.Identity()),
        (StageInfo("pool", 1, 0), GlobalPool()),
    ]
    model = StagedModel(name=NAME, family=NAME, stages=stages, num_classes=len(dataset.classes), preactivation=None)
    return Artifact(model, NetworkCard.of(NAME, dataset), sha256(path))


def load_logits(config: DistillConfig, task: DistillTask, images: Images) -> None:
    """Let the file that `teacher.logits` names stand for the teacher. UsageError where it is not of these images."""
    if (path := config.teacher.logits) is not None:
        task.teacher_features = SavedLogits(_read(path, images, config).to(next(task.parameters()).device))


def _read(path: Path, images: Images, config: DistillConfig) -> Tensor:
    shape = len(images.shown), len(images.dataset.classes)
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            about: dict[str, Any] = file.metadata() or {}
            logits: Tensor = file.get_tensor("logits")
        classes = parse_json(about["classes"]) if "classes" in about else None
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = one_line(error, 80)
        raise UsageError(f"teacher.logits: {path}: no safetensors file with a tensor `logits` ({reason})") from None
    text = ""
    if tuple(logits.shape) != shape or not logits.is_floating_point():
        kind = f"{str(logits.dtype).removeprefix('torch.')} {list(logits.shape)}"
        text = f"holds {kind}; wanted are floating-point numbers {list(shape)} (images, classes)"
    elif not bool((finite := (logits := logits.float()).isfinite().all(dim=1)).all()):
        text = f"the logits of image {int(finite.int().argmin())}, counted from 0, are not finite in 32 bits"
    if text:
        raise UsageError(f"teacher.logits: {path}: {text}")
    if classes is not None and tuple(classes) != images.dataset.classes:
        raise UsageError(f"teacher.logits: {path}: its classes are not those of {images.dataset.name}")
    digest = images.fingerprint(config.data).digest
    if about.get("images") != digest:
        raise UsageError(
            f"teacher.logits: {path}: is of other images ({str(about.get('images'))[:12]}, these are {digest[:12]})",
            "its metadata names the SHA-256 of the images.json of a run with these data settings",
        )
    return logits
