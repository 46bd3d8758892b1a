"""The teacher's answers to every view of every training image, computed once: later runs need no teacher.

Crop with a border of p pixels and flip has V = 2 (2p + 1)^2 views per image, 162 for CIFAR. For methods that look at
the teacher's pooled vector and logits only, all N V answers are kept in 16 bits (3.7 GB for CIFAR and wrn_40_2) and
looked up; with the same teacher, images and augmentation every later run finds them on the disk.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from sakd_cli.batch import Batch
from sakd_cli.data.sources import Views
from sakd_cli.engine.reporter import Reporter, raise_if_stopped, reporting
from sakd_cli.engine.runtime import Mode
from sakd_cli.errors import DiskError, MemoryLimitError
from sakd_cli.files import read_json, sha256
from sakd_cli.models.artifact import Artifact
from sakd_cli.models.staged import Features
from sakd_cli.writing import flush, wait_for_lock, write_json

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
        file.truncate(8 + len(header) + end)
    begin = 8 + len(header)
    return {name: np.memmap(path, np.float16, "r+", begin + places[name], shapes[name]) for name in shapes}


def _gb(count: int) -> str:
    return f"{count / 1e9:.2g} GB"
