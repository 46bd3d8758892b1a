"""Files made to hurt: nothing in them runs, nothing fills the memory, nothing reaches the terminal raw.

Every attack is a real process. It must end with exit code 2, 3 or 4 and one line, in less than 10 s and 1.5 GB, with
the folder as it was; the canary is a file that any code in a pickle or in YAML would make.
"""

import collections
import functools
import io
import json
import os
import pickle
import shlex
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from conftest import DRAWN
from fork_server import Child, Faults, ForkServer
from safetensors.torch import save

from sakd_cli.config.datasets import CIFAR100Config
from sakd_cli.data import torchvision_sets
from sakd_cli.engine import checkpoint
from sakd_cli.errors import DataError
from sakd_cli.files import json_bytes, sha256
from sakd_cli.models import artifact

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202e"
MOST_SECONDS, MOST_MEMORY = 10, 1.5e9
TINY = shlex.split(f"{DRAWN} --set data.train=60 --batch-size 20 --epochs 1 -q")


class Canary:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, ("sang",)


PICKLE = pickle.dumps(Canary(), protocol=2)


def header(arguments: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with this header, whatever it says."""
    text = arguments if isinstance(arguments, bytes) else json.dumps(arguments).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(shape: list[int], start: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def card(**arguments: Any) -> bytes:
    """A network file whose card says this, with the right digest."""
    about = artifact.NetworkCard("resnet8", "shapes", ("a", "b"), (0.5,) * 3, (0.3,) * 3, 32)._asdict() | arguments
    tensors = {"stages.0.0.weight": torch.zeros(1)}
    text = json.dumps(about)
    entry = {"format": artifact.FORMAT, "card": text, "digest": artifact._digest(text, tensors)}
    return save(tensors, {"sakd": json.dumps(entry)})


def bomb() -> bytes:
    """A PyTorch file of 1 MB that unpacks to 256 MB."""
    whole = io.BytesIO()
    torch.save({"conv1.weight": torch.zeros(4)}, whole)
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(whole) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as target,
    ):
        for name in source.namelist():
            with target.open(name, "w") as member:
                for _ in range(256 if "/data/" in name else 1):
                    member.write(bytes(2**20) if "/data/" in name else source.read(name))
    return packed.getvalue()


def torch_file(content: Any, **settings: Any) -> bytes:
    whole = io.BytesIO()
    torch.save(content, whole, **settings)
    return whole.getvalue()


def script() -> bytes:
    """What PyTorch takes for a TorchScript archive, which holds code."""
    whole = io.BytesIO(torch_file({"conv1.weight": torch.zeros(4)}))
    with zipfile.ZipFile(whole, "a") as archive:
        archive.writestr("archive/constants.pkl", PICKLE)
    return whole.getvalue()


def merged(levels: int) -> str:
    """YAML of a few lines that stands for 2^levels values."""
    return "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n}\n  <<: [*a{n - 1}, *a{n - 1}]\n" for n in range(1, levels))


FILES: dict[str, Callable[[], bytes]] = {
    "pickle.safetensors": lambda: PICKLE,
    "pickle.pth": lambda: PICKLE,
    "pickle.yaml": lambda: PICKLE,
    "object.pth": lambda: torch_file({"model": {"conv1.weight": torch.zeros(1)}, "opt": Canary()}),
    "legacy.pth": lambda: torch_file({"conv1.weight": Canary()}, _use_new_zipfile_serialization=False),
    "hooked.pth": lambda: torch_file(functools.partial(os.mknod, "sang")),
    "defaults.pth": lambda: torch_file(collections.defaultdict(os.getpid)),
    "bomb.pth": bomb,
    "script.pth": script,
    "text.pth": lambda: b"PK\x03\x04 not a zip",
    "deep.pth": lambda: b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "endless.safetensors": lambda: header({}, length=2**63),
    "wide.safetensors": lambda: header(b"{" + b" " * (100 * 2**20) + b"}"),
    "many.safetensors": lambda: header({f"t{n}": tensor([0], 0, 0) for n in range(50_000)}),
    "overlap.safetensors": lambda: header({"a": tensor([2], 0, 8), "b": tensor([2], 4, 12)}, bytes(12)),
    "hole.safetensors": lambda: header({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
    "huge.safetensors": lambda: header({"a": tensor([2**40, 2**40], 0, 4)}, bytes(4)),
    "hollow.safetensors": lambda: header({"a": tensor([2**60, 0], 0, 0)}),
    "nested.safetensors": lambda: header(b"[" * 100_000),
    "giant.safetensors": lambda: card(architecture="wrn_1000_100"),
    "titan.safetensors": lambda: card(architecture="wrn_999999994_9"),
    "crowd.safetensors": lambda: card(classes=["x"] * 300_000),
    "escapes.safetensors": lambda: card(dataset=ESCAPES, architecture=f"resnet{ESCAPES}"),
    "kinds.safetensors": lambda: card(classes=[1, {}], mean="abc", side=None),
    "named.safetensors": lambda: save({f"{ESCAPES}weight": torch.zeros(1)}),
    "object.yaml": lambda: b"!!python/object/apply:os.mknod ['sang']",
    "laughs.yaml": lambda: b"a: &a [1]\n" + b"".join(b"k%d: &k%d [%s]\n" % (n, n, b"*a," * 9) for n in range(9)),
    "circle.yaml": lambda: b"train: &a\n  lr: *a\n",
    "merged.yaml": lambda: merged(60).encode(),
    "deep.yaml": lambda: b"seed: " + b"[" * 30_000,
    "long.yaml": lambda: b"".join(b"k%d: 0\n" % n for n in range(10**6)),
    "digits.yaml": lambda: b"seed: 0x" + b"f" * 60_000,
    "escapes.yaml": lambda: json.dumps({f"a{ESCAPES}": ESCAPES}).encode(),
    "nul.yaml": lambda: b'runs_dir: "a\\0b"\n',
}
# What is asked of them: exit code, and the arguments; RUN is a run directory of its own for each attack.
ATTACKS = """
2 | distill --student resnet8 TINY --teacher pickle.safetensors
2 | eval pickle.safetensors --dataset shapes -q
2 | import-weights pickle.safetensors --model resnet8
2 | import-weights pickle.pth --model resnet8
2 | distill --student resnet8 TINY --teacher pickle.pth
2 | eval bomb.pth -q
2 | import-weights object.pth --model resnet8
2 | import-weights legacy.pth --model resnet8
2 | import-weights hooked.pth --model resnet8
2 | import-weights defaults.pth --model resnet8
2 | import-weights script.pth --model resnet8
2 | import-weights bomb.pth --model resnet8
2 | import-weights text.pth --model resnet8
2 | import-weights deep.pth --model resnet8
2 | import-weights /dev/zero --model resnet8
2 | import-weights pipe --model resnet8
2 | import-weights named.safetensors --model resnet8
2 | import-weights many.safetensors --model resnet8
2 | eval endless.safetensors -q
2 | eval wide.safetensors -q
2 | import-weights wide.safetensors --model resnet8
2 | eval overlap.safetensors -q
2 | eval hole.safetensors -q
2 | eval huge.safetensors -q
2 | eval hollow.safetensors -q
2 | eval nested.safetensors -q
2 | eval giant.safetensors -q
2 | eval titan.safetensors -q
2 | eval crowd.safetensors -q
2 | eval escapes.safetensors -q
2 | eval kinds.safetensors -q
2 | eval /dev/zero -q
2 | eval pipe -q
2 | pretrain-teacher --config object.yaml
2 | pretrain-teacher --config pickle.yaml
2 | pretrain-teacher resnet8 TINY --set !!python/object/apply:os.mknod=sang
2 | pretrain-teacher resnet8 TINY --set seed=!!python/object/apply:os.mknod[sang]
2 | pretrain-teacher --config laughs.yaml
2 | pretrain-teacher --config circle.yaml
2 | pretrain-teacher --config merged.yaml
2 | pretrain-teacher --config deep.yaml
2 | pretrain-teacher --config long.yaml
2 | pretrain-teacher resnet8 TINY --config digits.yaml
2 | pretrain-teacher resnet8 --config escapes.yaml
2 | pretrain-teacher --config /dev/zero
2 | pretrain-teacher --config pipe
2 | pretrain-teacher resnet8 TINY --config nul.yaml
2 | distill --student resnet8 --teacher resnet8 TINY --set method.weights=../../etc/passwd
2 | distill --student resnet8 --teacher resnet8 TINY --set teacher.weights=../../../../../../etc/passwd
2 | distill --student resnet8 --teacher /etc/passwd TINY
2 | pretrain-teacher wrn_999994_64 TINY
3 | pretrain-teacher resnet8 --dataset cifar10 --data-root /etc --set data.download=false -q
5 | pretrain-teacher resnet8 TINY --runs-dir pickle.pth
5 | pretrain-teacher resnet8 TINY --runs-dir /dev/null
2 | pretrain-teacher resnet8 TINY --resume RUN-linked
2 | pretrain-teacher resnet8 TINY --run-dir RUN-linked2 --overwrite
4 | pretrain-teacher --resume RUN-pickle-state -q
4 | pretrain-teacher --resume RUN-pickle-tensors -q
4 | pretrain-teacher --resume RUN-pickle-manifest -q
4 | pretrain-teacher --resume RUN-keys-manifest -q
4 | pretrain-teacher --resume RUN-deep-state -q
4 | pretrain-teacher --resume RUN-odd-state -q
4 | pretrain-teacher --resume RUN-wide-tensors -q
4 | pretrain-teacher --resume RUN-object-config -q
4 | pretrain-teacher --resume RUN-deep-summary -q
4 | inspect-spots RUN-escapes-config
"""


def sealed(last: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint, under a manifest that fits."""
    (last / name).write_bytes(content)
    names = (checkpoint.MODEL, checkpoint.STATE, checkpoint.TRAINING)
    (last / checkpoint.MANIFEST).write_bytes(json_bytes({name: sha256(last / name) for name in names}))


def spoil(run: Path, kind: str) -> None:
    """Make of a sound, unfinished run what its name says."""
    last = run / "checkpoints" / "last"
    state = json.loads((last / checkpoint.STATE).read_text())
    match kind:
        case "linked" | "linked2":
            shutil.copy(run / "metrics.jsonl", run.parent / f"{kind}.victim")
            (run / "metrics.jsonl").unlink()
            (run / "metrics.jsonl").symlink_to(run.parent / f"{kind}.victim")
        case "pickle-state":
            sealed(last, checkpoint.STATE, PICKLE)
        case "pickle-tensors":
            sealed(last, checkpoint.TRAINING, PICKLE)
        case "pickle-manifest":
            (last / checkpoint.MANIFEST).write_bytes(PICKLE)
        case "keys-manifest":
            (last / checkpoint.MANIFEST).write_bytes(json_bytes({str(n): "" for n in range(10**6)}))
        case "deep-state":
            sealed(last, checkpoint.STATE, b"[" * 100_000)
        case "odd-state":
            sealed(last, checkpoint.STATE, json_bytes(state | {"step": "many", "meter": [], "best": 3}))
        case "wide-tensors":
            sealed(last, checkpoint.TRAINING, header(b"{" + b" " * 2**25 + b"}"))
        case "object-config":
            (run / "config.yaml").write_text("task: !!python/object/apply:os.mknod ['sang']")
        case "deep-summary":
            (run / "summary.json").write_bytes(b"[" * 100_000)
        case "escapes-config":
            (run / "config.yaml").write_text(json.dumps({"task": ESCAPES}))


@pytest.fixture(scope="module")
def den(fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> ForkServer:
    """A folder with all of it."""
    here = fork_server.at(tmp_path_factory.mktemp("den"))
    for name, make in FILES.items():
        (here.cwd / name).write_bytes(make())
    os.mkfifo(here.cwd / "pipe")
    made = here.sakd("pretrain-teacher", "resnet8", *TINY, "--run-dir", "sound")
    assert made.code == 0, made.err
    kinds = {word for line in ATTACKS.splitlines() for word in line.split() if word.startswith("RUN-")}
    for kind in kinds:
        gone = shutil.ignore_patterns("summary.json", "best", "previous")
        shutil.copytree(here.cwd / "sound", here.cwd / kind, ignore=gone)
        spoil(here.cwd / kind, kind.removeprefix("RUN-"))
    return here


def harmless(child: Child) -> None:
    """Nothing on the terminal but text; neither slow nor large."""
    for result in (child.out, child.err):
        assert all(c == "\n" or c.isprintable() for c in result), repr(result)
    assert child.cpu_seconds < MOST_SECONDS
    assert child.peak < MOST_MEMORY


@pytest.mark.parametrize("case", ATTACKS.strip().splitlines(), ids=lambda case: case.partition("|")[2].strip())
def test_an_attack_ends_in_one_line(den: ForkServer, case: str) -> None:
    code, _, line = case.partition("|")
    arguments = [part for word in line.split() for part in (TINY if word == "TINY" else [word])]
    harmless(den.assert_rejects(arguments, int(code), "", Faults(memory=6 * 2**30)))
    assert not (den.cwd / "sang").exists()


def test_the_canary_would_sing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(PICKLE)
    assert (tmp_path / "sang").exists()


def test_names_from_files_and_words_are_printed_without_their_escapes(den: ForkServer) -> None:
    folder = den.cwd / f"run{ESCAPES}"
    shutil.copytree(den.cwd / "sound", folder)
    spot = {"name": ESCAPES, "kind": ESCAPES, "fraction": 0.5, "probability": None, "by_class": [0.5]}
    means = ("router_loss_scaled_up", "router_loss_scaled_down", "count_penalty_active", "routed_ce", "student_ce")
    spots = {"epoch": 1, "samples": 1, "spots": [spot], "empty_selection": [0.0], **dict.fromkeys(means)}
    arguments = {"task": "distill", "student": ESCAPES, "teacher": {"source": ESCAPES}, "method": {"name": ESCAPES}}
    seen = [den.sakd("eval", str(folder)), den.sakd("eval", str(folder), "--json")]
    (folder / "config.yaml").write_text(json.dumps(arguments))
    (folder / "spots.jsonl").write_text(json.dumps(spots) + "\n" + "[" * 100_000 + "\n")
    seen += [den.sakd("inspect-spots", str(folder), *more) for more in ([], ["--json"])]
    seen += [
        den.sakd(*arguments)
        for arguments in (["list", ESCAPES], [ESCAPES], ["eval", ESCAPES], ["distill", "--method", ESCAPES])
    ]
    seen.append(den.sakd("config", "show", "--set", "student=resnet8", "--teacher", ESCAPES))
    seen.append(den.sakd("pretrain-teacher", "resnet8", *TINY[:-1], "--run-dir", f"new{ESCAPES}"))
    for child in seen:
        harmless(child)
        assert "Traceback" not in child.err
        assert "internal error" not in child.err
    assert [child.code for child in seen[:2]] == [0, 0]
    assert seen[-1].code == 0


def test_an_archive_that_reaches_out_of_its_folder_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "cifar-100-python.tar.gz"
    (tmp_path / "payload").write_bytes(PICKLE)
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../../slipped", str(tmp_path / "absolute"), "cifar-100-python/train"):
            tar.add(tmp_path / "payload", name)
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "url", archive.as_uri())
    monkeypatch.setattr(kind, "tgz_md5", torchvision.datasets.utils.calculate_md5(archive))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(DataError, match="the download failed"):
        torchvision_sets.load_cifar(CIFAR100Config(root=tmp_path / "data"))
    assert sorted(tmp_path.rglob("*")) == before
