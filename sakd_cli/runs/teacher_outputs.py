"""What stands for a teacher's pass: its logits in a file (`teacher.logits`), or its answers from a cache on the disk.

Crop with a border of p pixels and flip has V = 2 (2p + 1)^2 views per image, 162 for CIFAR. For methods that look at
the teacher's pooled vector and logits only, all N V answers are kept in 16 bits (3.7 GB for CIFAR and wrn_40_2) and
looked up; with the same teacher, images and augmentation every later run finds them on the disk.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from sakd_cli.batch import Batch
from sakd_cli.config.training import DistillConfig
from sakd_cli.data.dataset import Dataset
from sakd_cli.data.sources import Views
from sakd_cli.engine.reporter import Reporter, raise_if_stopped, reporting
from sakd_cli.engine.runtime import Mode
from sakd_cli.errors import DiskError, MemoryLimitError, UsageError, one_line
from sakd_cli.files import check_header, parse_json, read_json, sha256
from sakd_cli.models.artifact import Artifact, NetworkCard
from sakd_cli.models.layers import GlobalPool
from sakd_cli.models.staged import Features, StagedModel, StageInfo
from sakd_cli.runs.images import Images
from sakd_cli.tasks.distill import DistillTask
from sakd_cli.writing import flush, wait_for_lock, write_json

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


FORMAT = "sakd.teacher-cache/1"
ROWS = 2000  # views answered at once
BYTES = 2  # of a number


class Layout(NamedTuple):
    """Size of a teacher cache: images, views of each, width of the pooled vector, classes."""

    images: int
    views: int
    width: int
    classes: int

    @property
    def rows(self) -> int:
        return self.images * self.views

    @property
    def bytes(self) -> int:
        return self.rows * (self.width + self.classes) * BYTES


class TeacherCache:
    """Answers of a teacher, by image and view. Called like its plain pass; what it has not kept is empty.

    pooled [rows, C] and logits [rows, K] in 16 bits, row = image * views + view; stages: how many features it has.
    """

    def __init__(self, pooled: Tensor, logits: Tensor, views: int, stages: int) -> None:
        self.pooled, self.logits, self.views = pooled, logits, views
        self._missing = (pooled.new_empty(0),) * (stages - 1)

    def __call__(self, batch: Batch) -> Features:
        """[N] images of known view to Features whose last stage is the pooled vector [N, C] and logits [N, K]."""
        assert batch.view is not None
        row = batch.index * self.views + batch.view
        return Features((*self._missing, self.pooled[row]), self.logits[row])


def open_teacher_cache(
    folder: Path, teacher: Artifact, views: Views, mode: Mode, device: torch.device, reporter: Reporter
) -> TeacherCache:
    """The cache of this teacher and these images, from the disk; computed and written first if it is not there yet.

    Raises DiskError or MemoryLimitError, before anything is computed, where it does not fit.
    """
    model = teacher.model
    layout = Layout(len(views), views.count, model.infos[-1].channels, model.num_classes)
    about = json.dumps([FORMAT, teacher.sha256, views.digest(), str(mode.autocast_dtype)])
    path = folder / f"{teacher.model.name}-{hashlib.sha256(about.encode()).hexdigest()[:16]}.safetensors"
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else layout.bytes
    if layout.bytes > free:
        raise MemoryLimitError(f"teacher.cache: needs {_gb(layout.bytes)} on {device}, {_gb(free)} are free")
    text = f"another process computes {path}: waiting for it"
    lock = wait_for_lock(path.with_suffix(".lock"), lambda: reporter.say(text), hint="--runs-dir DIR")
    try:
        if not _whole(path):
            _compute(path, layout, teacher, views, mode, device, reporter)
    except OSError as error:
        path.with_suffix(".new").unlink(missing_ok=True)
        raise DiskError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        lock.release()
    tensors = load_file(path)  # mapped, not read, as long as it stays in main memory
    return TeacherCache(tensors["pooled"].to(device), tensors["logits"].to(device), views.count, len(model.infos))


def _whole(path: Path) -> bool:
    """Whether the file is there as it was written; a damaged one is computed anew."""
    try:
        return bool(read_json(path.with_suffix(".json"))["sha256"] == sha256(path))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _compute(
    path: Path, layout: Layout, teacher: Artifact, views: Views, mode: Mode, device: torch.device, reporter: Reporter
) -> None:
    free = shutil.disk_usage(path.parent).free
    if layout.bytes > free:
        raise DiskError(f"{path.parent}: a teacher cache needs {_gb(layout.bytes)}, {_gb(free)} are free")
    aside = path.with_suffix(".new")
    arrays = _empty_file(aside, layout)
    with reporting(reporter, f"teacher cache: {_gb(layout.bytes)} in {path}", layout.rows):
        for start, features in _answers(layout, teacher, views, mode):
            raise_if_stopped(reporter)
            for name, answers in zip(arrays, (features.embedding, features.logits), strict=True):
                arrays[name][start : start + len(answers)] = answers.to(torch.float16).cpu().numpy()
            reporter.advance(min(start + ROWS, layout.rows))
    for array in arrays.values():
        array.flush()
    write_json(path.with_suffix(".json"), {"format": FORMAT, "teacher": teacher.sha256, "sha256": sha256(aside)})
    aside.replace(path)
    flush(path.parent)


@torch.inference_mode()
def _answers(layout: Layout, teacher: Artifact, views: Views, mode: Mode) -> Iterator[tuple[int, Features]]:
    for start in range(0, layout.rows, ROWS):
        row = torch.arange(start, min(start + ROWS, layout.rows))
        images = views.images(row // views.count, row % views.count)
        with mode.networks(images.device):
            yield start, teacher.model.features(images)


def _empty_file(path: Path, layout: Layout) -> dict[str, Any]:
    """A safetensors file of the right size whose tensors are written through arrays: it need not fit into memory."""
    shapes = {"pooled": (layout.rows, layout.width), "logits": (layout.rows, layout.classes)}
    entries, places, end = {}, {}, 0
    for name, shape in shapes.items():
        places[name], end = end, end + shape[0] * shape[1] * BYTES
        entries[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [places[name], end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        begin = 8 + len(header)
        # Written to a hole for which a quota leaves no room, an array would end the process.
        reserve = getattr(os, "posix_fallocate", lambda handle, start, size: os.truncate(handle, size))
        reserve(file.fileno(), 0, begin + end)
    return {name: np.memmap(path, np.float16, "r+", begin + places[name], shapes[name]) for name in shapes}


def _gb(count: int) -> str:
    return f"{count / 1e9:.2g} GB"
