"""Checkpoints: a folder of safetensors and JSON with a manifest of SHA-256 sums. Nothing is a pickle.

    model.safetensors     the delivered network; opens alone
    training.safetensors  the rest of the task (router, adapters, distiller), momentum, spot record, random state
    state.json            step, epoch and figures
    manifest.json         SHA-256 of the three, written last

A checkpoint is written aside as `NAME.new` and flushed; then `NAME` becomes `previous` and `NAME.new` becomes `NAME`.
At every instant one of the three is whole. safetensors has no checksum, so the manifest is checked before use.
"""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sakd_cli.errors import CheckpointError, DiskError
from sakd_cli.rundir import sha256, write_aside, write_json

FORMAT = "sakd.checkpoint/1"
FILES = ("model.safetensors", "training.safetensors", "state.json")


class Loaded(NamedTuple):
    """What a checkpoint holds."""

    model: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]


def write(
    folder: Path, save_model: Callable[[Path], None], training: dict[str, Tensor], state: dict[str, Any], *, keep: bool
) -> None:
    """Write checkpoint `folder`; `save_model` writes the network's file. `keep`: the old one becomes `previous`."""
    aside = folder.with_name(f"{folder.name}.new")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        save_model(aside / "model.safetensors")
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in training.items()}
        write_aside(aside / "training.safetensors", save(tensors))
        write_json(aside / "state.json", {"format": FORMAT} | state)
        write_json(aside / "manifest.json", {name: sha256(aside / name) for name in FILES})
        _flush_folder(aside)
        if folder.exists():
            previous = folder.with_name("previous")
            shutil.rmtree(previous if keep else folder, ignore_errors=True)
            if keep:
                folder.replace(previous)
        aside.replace(folder)
        _flush_folder(folder.parent)
    except OSError as error:
        raise DiskError(f"{folder}: cannot be written: {error.strerror}") from None


def read(folder: Path) -> Loaded:
    """Check every file against the manifest, then load. Raises CheckpointError naming what is missing or damaged."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        expected = {name: manifest[name] for name in FILES}
    except (OSError, ValueError, KeyError, TypeError):
        raise CheckpointError(f"{folder}: its manifest is missing or damaged") from None
    for name, digest in expected.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name}: missing")
        if sha256(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: damaged, its SHA-256 differs from the manifest")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: written by another version of sakd ({state.get('format')!r})")
        return Loaded(load_file(folder / FILES[0]), load_file(folder / FILES[1]), state)
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None


def random_state() -> dict[str, Tensor]:
    """State of torch's own generators, which nothing of ours draws from but a network of the user's might."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["random/cuda"] = torch.cuda.get_rng_state()
    return states


def restore_random_state(tensors: dict[str, Tensor]) -> None:
    """Put `random_state` back."""
    torch.set_rng_state(tensors["random/cpu"])
    if "random/cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random/cuda"])


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
