"""Checkpoints: a folder of safetensors and JSON with a manifest of SHA-256 sums. Nothing is a pickle.

    model.safetensors     the delivered network, if the stage delivers one; opens alone
    training.safetensors  the rest of the task (router, adapters, distiller), what the optimizer remembers, spot record,
                          random state; the trained weights, where others are delivered
    state.json            step, epoch and figures
    manifest.json         SHA-256 of the others, written last

A checkpoint is staged as `NAME.new` and flushed; then `NAME` becomes `previous` and `NAME.new` becomes `NAME`.
At every instant one of the three is whole. safetensors has no checksum, so the manifest is checked before use.
"""

import hashlib
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from sakd_cli import distributed, files, writing
from sakd_cli.errors import CheckpointError

FORMAT = "sakd.checkpoint/4"
MODEL, TRAINING, STATE, MANIFEST = "model.safetensors", "training.safetensors", "state.json", "manifest.json"

MAX_MANIFEST_BYTES = 4096


class Checkpoint(NamedTuple):
    """What a checkpoint holds; `model` is None where the stage delivers no network."""

    folder: Path
    model: dict[str, Tensor] | None
    training: dict[str, Tensor]
    state: dict[str, Any]


def write(folder: Path, model: bytes | None, training: dict[str, Tensor], state: dict[str, Any], *, keep: bool) -> None:
    """Write checkpoint `folder`; `model`: the network's file. `keep`: the old one becomes `previous`."""
    staging = folder.with_name(f"{folder.name}.new")
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in training.items()}
    contents = {} if model is None else {MODEL: model}
    contents |= {TRAINING: save(tensors), STATE: files.json_bytes({"format": FORMAT} | state)}
    writing.verify(folder)
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for name, content in contents.items():
            writing.write_aside(staging / name, content)
        sums = {name: hashlib.sha256(contents[name]).hexdigest() for name in sorted(contents)}
        writing.write_json(staging / MANIFEST, sums)
        writing.flush(staging)
        writing.verify(folder)
        if folder.exists():
            previous = folder.with_name("previous")
            shutil.rmtree(previous if keep else folder, ignore_errors=True)
            if keep:
                folder.replace(previous)
        staging.replace(folder)
        writing.flush(folder.parent)
    except OSError as error:
        raise writing.disk_error(folder, error, sum(map(len, contents.values()))) from None


def read(folder: Path) -> Checkpoint:
    """Check every file against the manifest, then load. Raises CheckpointError naming what is missing or damaged.

    Where another process has put its next checkpoint there meanwhile, that one is read.
    """
    written, saved = _manifest(folder), None
    try:
        saved = _checked(folder, written)
    except (CheckpointError, RuntimeError):  # torch's, of a file that went away while it was opened
        if _manifest(folder) == written:
            raise
    return saved if saved is not None and _manifest(folder) == written else read(folder)


def _manifest(folder: Path) -> bytes:
    """Its bytes; none where there is none."""
    with suppress(OSError, ValueError):
        return files.read_bytes(folder / MANIFEST, MAX_MANIFEST_BYTES)
    return b""


def _checked(folder: Path, written: bytes) -> Checkpoint:
    """The checkpoint that this manifest is of."""
    try:
        expected: dict[str, str] = files.parse_json(written)
        least = {TRAINING, STATE}
        if files.json_bytes(expected) != written or not least <= expected.keys() <= least | {MODEL}:
            raise ValueError
    except (ValueError, AttributeError, TypeError):
        raise CheckpointError(f"{folder}: its manifest is missing or damaged") from None
    try:
        for path in folder.iterdir():
            hidden = path.name.startswith(".")  # as a file browser leaves them
            if path.name not in {*expected, MANIFEST} and not hidden:
                raise CheckpointError(f"{path}: not in the manifest of its checkpoint")
        for name, digest in expected.items():
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name}: missing")
            if files.sha256(folder / name) != digest:
                raise CheckpointError(f"{folder / name}: damaged, its SHA-256 differs from the manifest")
        state = files.read_json(folder / STATE)
        if state.get("format") != FORMAT:
            raise CheckpointError(f"{folder}: written by another version of sakd ({str(state.get('format'))[:40]!r})")
        for name in expected.keys() - {STATE}:
            files.check_header(folder / name)
        model = load_file(folder / MODEL) if MODEL in expected else None
        return Checkpoint(folder, model, load_file(folder / TRAINING), state)
    except (OSError, ValueError, AttributeError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: cannot be read: {error}") from None


def find(folder: Path, warn: Callable[[str], None] | None, run: str | None = None) -> Checkpoint | None:
    """The newest checkpoint of `last`, `last.new` and `previous` in `folder`; None where nothing was saved yet.

    One that was made by another run than `run` counts as damaged. A process that died between two renames leaves a
    whole `last.new`, which becomes `last`. Where `last` is damaged, `warn` is called and an older one is used; without
    `warn` that is a CheckpointError, as it is when none is whole.
    """
    last, staging, previous = (folder / name for name in ("last", "last.new", "previous"))
    if not last.exists() and staging.exists():
        try:
            _require_run(run, read(staging))
            staging.replace(last)
        except CheckpointError:
            pass  # a half-written one is no damage: it never was a checkpoint
    if last.exists():
        try:
            return _require_run(run, read(last))
        except CheckpointError as damage:
            if warn is None:
                raise CheckpointError(
                    damage.message, hint="--resume auto resumes from an older checkpoint, if one is whole"
                ) from None
            warn(damage.message)
    if previous.exists():
        return _require_run(run, read(previous))
    if last.exists():
        raise CheckpointError(f"{folder}: no whole checkpoint is left", hint="start anew: --overwrite, or another run")
    return None


def _require_run(run: str | None, loaded: Checkpoint) -> Checkpoint:
    if loaded.state.get("run") != run:
        raise CheckpointError(f"{loaded.folder}: belongs to another run")
    return loaded


def discard(folder: Path) -> None:
    writing.verify(folder)
    for name in ("last", "last.new", "previous", "best", "best.new"):
        shutil.rmtree(folder / name, ignore_errors=True)


def random_state() -> dict[str, Tensor]:
    """State of torch's own generators, from which layers of networks draw (dropout, drop path)."""
    states = {"random/cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # a run on the CPU makes no context on a GPU
        states |= {f"random/cuda{place}": state for place, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def random_state_of_others() -> dict[str, Tensor]:
    """The same of all processes but the first, each with its one device."""
    if distributed.world_size() == 1:
        return {}
    own = [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])]
    gathered = {name: distributed.gather(state) for name, state in zip(("cpu", "cuda"), own, strict=False)}
    return {f"random/{k}/{name}": of[k] for name, of in gathered.items() for k in range(1, len(of))}


def restore_random_state(tensors: dict[str, Tensor]) -> None:
    """Put it back, for as many devices and processes as are here."""
    if rank := distributed.rank():
        cpu, cuda = (tensors.get(f"random/{rank}/{name}") for name in ("cpu", "cuda"))
        if cpu is not None:  # else there were fewer processes, and this one begins with its own seed
            torch.set_rng_state(cpu)
        if cuda is not None and torch.cuda.is_initialized():
            torch.cuda.set_rng_state(cuda)
        return
    torch.set_rng_state(tensors["random/cpu"])
    for place in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if (state := tensors.get(f"random/cuda{place}")) is not None:
            torch.cuda.set_rng_state(state, place)
