"""A checkpoint on disk: read back as written, every damage seen, and one that is whole at every instant."""

import itertools
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CliRunner
from safetensors.torch import save

from sakd_cli import files
from sakd_cli.engine import checkpoint
from sakd_cli.errors import CheckpointError

FILES = (checkpoint.MODEL, checkpoint.TRAINING, checkpoint.STATE, checkpoint.MANIFEST)
TRAINING = {"task/policy": torch.arange(6.0).reshape(2, 3).T, "momentum/a": torch.ones(2, 2)}


def write(folder: Path, mark: float = 1.0, *, keep: bool = True) -> None:
    weights = {"weight": torch.full((2, 2), mark)}
    checkpoint.write(folder, save(weights), TRAINING, {"epoch": mark, "best": {}}, keep=keep)


def test_a_checkpoint_reads_back_as_it_was_written(tmp_path: Path) -> None:
    write(tmp_path / "last")
    loaded = checkpoint.read(tmp_path / "last")
    assert torch.equal(loaded.model["weight"], torch.ones(2, 2))
    assert loaded.training.keys() == TRAINING.keys()
    assert all(torch.equal(loaded.training[name], tensor) for name, tensor in TRAINING.items())
    assert loaded.state == {"format": checkpoint.FORMAT, "epoch": 1.0, "best": {}}
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == sorted(FILES)


def test_the_old_checkpoint_is_kept_where_it_is_asked_for(tmp_path: Path) -> None:
    for mark in (1.0, 2.0, 3.0):
        write(tmp_path / "last", mark)
        write(tmp_path / "best", mark, keep=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "previous"]
    marks = {name: checkpoint.read(tmp_path / name).state["epoch"] for name in ("best", "last", "previous")}
    assert marks == {"best": 3.0, "last": 3.0, "previous": 2.0}


@pytest.mark.parametrize("moment", range(3))
def test_a_checkpoint_that_is_written_while_another_is_read_is_the_one_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    write(tmp_path / "last", keep=False)
    read, count = files.sha256, itertools.count()

    def interrupted(path: Path) -> str:
        if next(count) == moment:
            write(tmp_path / "last", 2.0, keep=False)
        return read(path)

    monkeypatch.setattr(files, "sha256", interrupted)
    loaded = checkpoint.read(tmp_path / "last")
    assert (loaded.state["epoch"], loaded.model["weight"].mean()) == (2.0, 2.0)


@pytest.mark.parametrize("file", FILES)
def test_every_flipped_bit_every_cut_and_every_missing_file_is_found(tmp_path: Path, file: str) -> None:
    write(tmp_path / "last")
    path = tmp_path / "last" / file
    sound = path.read_bytes()
    damaged = [sound[:length] for length in (0, 1, len(sound) // 2, len(sound) - 2)] + [sound + b"\0"]
    damaged += [sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :] for at in range(len(sound))]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            checkpoint.read(tmp_path / "last")
        assert str(tmp_path / "last") in caught.value.message
    path.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        checkpoint.read(tmp_path / "last")


def found_out(folder: Path) -> bool:
    try:
        checkpoint.read(folder)
    except CheckpointError as error:
        return str(folder) in error.message
    return False


@pytest.mark.parametrize("scale", [1, pytest.param(20, marks=pytest.mark.battery)])
def test_a_real_checkpoint_shows_every_damage(
    trained_cli: CliRunner, teacher: Path, distilled: dict[str, Any], tmp_path: Path, scale: int
) -> None:
    """200 flipped bits, 50 cuts, every mixture with another run's files, files missing, empty, odd: times `scale`."""
    draw, last = random.Random(scale), tmp_path / "last"
    shutil.copytree(trained_cli.path / distilled["run"] / "checkpoints" / "last", last)
    sound = {name: (last / name).read_bytes() for name in FILES}
    other = {name: (teacher / "checkpoints" / "last" / name).read_bytes() for name in FILES}
    spoilt: list[dict[str, bytes]] = []
    for number in range(200 * scale):
        name = FILES[number % 4]
        flipped = bytearray(sound[name])
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        spoilt.append({name: bytes(flipped)})
    for number in range(50 * scale):
        name = FILES[number % 4]
        spoilt.append({name: sound[name][: draw.randrange(len(sound[name]))]})
    mixtures = (names for size in (1, 2, 3) for names in itertools.combinations(FILES, size))
    spoilt += [{name: other[name] for name in names} for names in mixtures]
    spoilt += [{"one_more.json": b"{}"}, {"model.pth": b""}, *({name: b""} for name in FILES)]
    for damage in spoilt:
        for name, content in damage.items():
            (last / name).write_bytes(content)
        assert found_out(last), f"{list(damage)} of {scale}"
        for name in damage:
            (last / name).unlink() if name not in sound else (last / name).write_bytes(sound[name])
    for name in FILES:
        (last / name).unlink()
        assert found_out(last)
        (last / name).write_bytes(sound[name])
    assert len(spoilt) == 250 * scale + 14 + 6
    assert not found_out(last)


def test_a_checkpoint_of_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FORMAT", "sakd.checkpoint/0")
    write(tmp_path / "last")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="another version"):
        checkpoint.read(tmp_path / "last")


class Killed(BaseException):
    """The process dies here."""


def dying(call: Callable[..., Any], countdown: list[int]) -> Callable[..., Any]:
    def wrapped(*args: Any, **settings: Any) -> Any:
        countdown[0] -= 1
        if countdown[0] < 0:
            raise Killed
        return call(*args, **settings)

    return wrapped


@pytest.mark.parametrize("keep", [True, False])
def test_at_every_instant_one_checkpoint_is_whole(tmp_path: Path, keep: bool) -> None:
    for survived in range(99):
        folder = tmp_path / str(survived) / "last"
        write(folder, 1.0)
        write(folder, 2.0, keep=keep)
        with pytest.MonkeyPatch.context() as patch:
            countdown = [survived]
            for place, name in ((os, "fsync"), (shutil, "rmtree"), (Path, "replace"), (Path, "mkdir")):
                patch.setattr(place, name, dying(getattr(place, name), countdown))
            try:
                write(folder, 3.0, keep=keep)
                break
            except Killed:
                pass
        candidates = [folder.with_name(name) for name in ("last", "last.new", "previous")]
        assert {state_of(path) for path in candidates} & {2.0, 3.0}, f"nothing left after {survived} operations"
    assert survived > 8
    assert state_of(folder) == 3.0


def state_of(folder: Path) -> Any:
    try:
        return checkpoint.read(folder).state["epoch"]
    except CheckpointError:
        return None


def test_checkpoints_inside_an_epoch_leave_the_best_one_as_it_was(cli: CliRunner, tmp_path: Path) -> None:
    few = "--dataset shapes --set data.train=120 --set data.test=40 --set data.size=16 --batch-size 12 -q"
    sums = set()
    for name, often in (("seldom", []), ("often", ["--set", "save_every=2"])):
        run = tmp_path / name
        summary = cli.sakd(
            "pretrain-teacher", "resnet8", *few.split(), "--json", "--epochs", "4", *often, "--run-dir", str(run)
        ).document
        assert summary["best"]["epoch"] < 4, "an epoch after the best one, for the test to mean something"
        sums.add((run / "checkpoints" / "best" / "model.safetensors").read_bytes())
    assert len(sums) == 1


@pytest.mark.parametrize("damage", ["longer", "of another run"])
def test_a_best_epoch_that_is_not_the_runs_own_is_told_and_not_reported(
    cli: CliRunner, tmp_path: Path, damage: str
) -> None:
    few = ["--dataset", "shapes", "--set", "data.train=40", "--set", "data.test=20", "--batch-size", "12", "-q"]
    for seed in "01":
        own = ["--epochs", "2", "--seed", seed, "--run-dir", str(tmp_path / seed)]
        assert cli.sakd("pretrain-teacher", "resnet8", *few, *own).code == 0
    best = tmp_path / "0" / "checkpoints" / "best"
    if damage == "longer":
        (best / "model.safetensors").write_bytes((best / "model.safetensors").read_bytes() + b"x")
    else:
        shutil.rmtree(best)
        shutil.copytree(tmp_path / "1" / "checkpoints" / "best", best)
    result = cli.sakd("pretrain-teacher", "--resume", str(tmp_path / "0"), "--epochs", "3", "-q", "--json")
    assert result.code == 0, result.err
    assert "checkpoints/best" in "".join(result.err.split())
    assert "takes its place" in " ".join(result.err.split())
    assert result.document["best"]["epoch"] == 3, "the only one that is left"
