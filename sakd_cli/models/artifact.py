"""A trained network on disk: `model.safetensors` with all that is needed in its header, and a folder around it."""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from sakd_cli.config.code import TRUST, untrusted
from sakd_cli.config.networks import brought
from sakd_cli.config.preprocessing import HUB, ImageSize, Preprocessing, height_width, of_timm, size_text
from sakd_cli.data.dataset import Dataset
from sakd_cli.errors import NonFiniteError, UsageError, first_line
from sakd_cli.files import check_header, parse_json, sha256, weights_file, yaml_bytes
from sakd_cli.models.external import Call, check_size, library_call
from sakd_cli.models.staged import StagedModel
from sakd_cli.models.table import create
from sakd_cli.writing import disk_error, verify, write_aside, write_json

FORMAT = "sakd.network/1"
IMPORT = "weights of another program: sakd import-weights FILE --model NAME"
CHANNELS, LARGEST_SIDE = 3, 2048  # of images; pixels
Module = TypeVar("Module", bound=nn.Module)
Card = TypeVar("Card")


class NetworkCard(NamedTuple):
    """What the weights need to be used.

    mean, std      of pixel values in [0, 1]
    side           of the square images in pixels, or their height and width
    preprocessing  how a picture becomes one of them; None: it was never said, or there were no picture files
    """

    architecture: str
    dataset: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    side: ImageSize
    preprocessing: Preprocessing | None = None

    @classmethod
    def of(cls, architecture: str, data: Dataset, side: ImageSize | None = None) -> "NetworkCard":
        """That of a network for the images of a data set; side: None: the data set's."""
        side = data.train.side if side is None else side
        return cls(architecture, data.name, data.classes, data.mean, data.std, side, data.seen)

    @property
    def seen(self) -> Preprocessing:
        """How a picture is to be shown to the network."""
        return self.preprocessing or Preprocessing(size=self.side, resize=min(height_width(self.side)))

    def library_call(self) -> Call | None:
        """How a library builds the network; None where its architecture is of our own."""
        return library_call(self.architecture, len(self.classes), self.side)

    def plain(self) -> dict[str, Any]:
        """As the header of the weights has it."""
        return self._asdict() | {"preprocessing": self.preprocessing and self.preprocessing.model_dump(mode="json")}

    def config_entries(self) -> dict[str, Any]:
        """As `config.json` has it: how a picture is to be shown is always said."""
        return self._asdict() | {"preprocessing": self.seen.model_dump(mode="json")}


_CARD = TypeAdapter(NetworkCard)


def _card(text: str) -> NetworkCard:
    """A card from a header. Raises ValueError naming what no network can have been trained with."""
    card = _CARD.validate_json(text)
    for name, numbers in (("mean", card.mean), ("std", card.std)):
        if len(numbers) != CHANNELS or not all(map(math.isfinite, numbers)) or (name == "std" and min(numbers) <= 0):
            raise ValueError(f"its card has the {name} {list(numbers)[:CHANNELS]}")
    if not all(0 < side <= LARGEST_SIDE for side in height_width(card.side)):
        raise ValueError(f"its card has images of {card.side} pixels")
    if not card.classes:
        raise ValueError("its card has no classes")
    return card


class Artifact(NamedTuple):
    """A network that was read back: the model on the CPU, its card, the SHA-256 of its file, what is worth telling."""

    model: StagedModel
    card: NetworkCard
    sha256: str
    notes: tuple[str, ...] = ()


def weights_bytes(model: StagedModel, card: NetworkCard) -> bytes:
    return module_bytes(FORMAT, model, json.dumps(card.plain()))


def save_weights(path: Path, model: StagedModel, card: NetworkCard) -> None:
    write_aside(path, weights_bytes(model, card))


def module_bytes(form: str, module: nn.Module, card: str) -> bytes:
    """The file of a module, with its `card` (JSON) and the digest of its numbers in the header."""
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in module.state_dict().items()}
    header = {"format": form, "card": card, "digest": _digest(card, tensors)}
    # One entry: safetensors writes several in a random order, and the same network must be the same file.
    return save(tensors, {"sakd": json.dumps(header)})


def save_folder(folder: Path, model: StagedModel, card: NetworkCard, facts: dict[str, Any]) -> None:
    """Write the deployable folder; `facts` are further entries of its config.json (figures, the teacher's hash)."""
    write_folder(folder, weights_bytes(model, card), card, facts)


def write_folder(folder: Path, weights: bytes, card: NetworkCard, facts: dict[str, Any]) -> None:
    """The same of a network whose file holds `weights`."""
    verify(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise disk_error(folder, error, len(weights)) from None
    write_aside(folder / "model.safetensors", weights)
    about = card.config_entries() | {"format": FORMAT, "sha256": hashlib.sha256(weights).hexdigest()} | facts
    write_json(folder / "config.json", about)
    write_aside(folder / "README.md", (metadata_block(card, about, "pytorch") + _readme(card, about)).encode())


def load(path: Path) -> Artifact:
    """Read a weights file or the folder around one. UsageError where it is missing, damaged or not ours."""
    if not (file := weights_file(path)).is_file():
        raise UsageError(f"{file}: no such file", hint="give a run directory or a model.safetensors written by sakd")
    return Artifact(*load_module(file, FORMAT, "a network", _network))


def read_card(path: Path) -> NetworkCard:
    """The card of a weights file or the folder around one, from its header alone; UsageError as `load`."""
    file = weights_file(path)
    try:
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            header = parse_json((opened.metadata() or {}).get("sakd", "{}"))
        return _card(header["card"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{file}: not a network saved by sakd ({first_line(error)})", hint=IMPORT) from None


def is_ours(path: Path) -> bool:
    """Whether a folder or file is, or may once have been, one of sakd: a safetensors file with our header."""
    if path.is_dir():
        return True
    try:
        return "sakd" in read_tensors(path)[0]
    except UsageError:
        return False


def _network(header: str, numbers: int) -> tuple[StagedModel, NetworkCard]:
    card = _card(header)
    if unknown := untrusted(card.architecture):
        raise UsageError(
            f"these are the weights of {unknown[0]}, which would run code that you have not named",
            hint=f"where you trust it: {TRUST}={unknown[0]} sakd ...",
        )
    check_size(card.architecture, len(card.classes), card.side, numbers)
    return create(card.architecture, len(card.classes), card.side), card


def load_module(
    file: Path, form: str, kind: str, build: Callable[[str, int], tuple[Module, Card]]
) -> tuple[Module, Card, str]:
    """Read what `module_bytes` made: the module on the CPU, its card, the SHA-256 of the file.

    `build` makes module and card of the header's text on the meta device, since it may name what fills the memory, and
    is told how many numbers there are for it. Raises UsageError where the file is damaged or not `kind`, NonFiniteError
    where a weight is NaN or infinite.
    """
    entries, tensors = read_tensors(file)
    try:
        header: Any = parse_json(entries.get("sakd", "{}"))
    except ValueError:
        header = {}
    header = header if isinstance(header, dict) else {}
    if header.get("format") != form:
        raise UsageError(
            f"{file}: not {kind} saved by sakd (format {str(header.get('format'))[:40]!r}, expected {form!r})",
            hint=IMPORT,
        )
    if header.get("digest") != _digest(str(header.get("card")), tensors):
        raise UsageError(f"{file}: damaged, its content does not fit the digest in its header")
    try:
        with torch.device("meta"):
            module, card = build(header["card"], sum(tensor.numel() for tensor in tensors.values()))
        module = fill_weights(module, tensors)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise UsageError(f"{file}: its weights do not fit its header ({first_line(error)})") from None
    check_finite(file, tensors)
    return module, card, sha256(file)


def read_tensors(file: Path, hint: str | None = IMPORT) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Entries of the header and tensors of a safetensors file. Raises UsageError where it cannot be read."""
    try:
        check_header(file)
        with safe_open(file, framework="pt") as opened:
            return opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{file}: damaged or not a safetensors file ({first_line(error)})", hint) from None


def meta_network(architecture: str, classes: int, side: ImageSize) -> StagedModel:
    """The network without its numbers, on the meta device; one of another library with numbers, on the CPU."""
    with torch.device("meta"):
        return create(architecture, classes, side)


def shapes_of(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def fill_weights(module: Module, tensors: dict[str, Tensor]) -> Module:
    """Load weights into a module on the meta device or CPU, ending on the CPU. ValueError where they do not fit."""
    expected = module.state_dict()
    if odd := sorted(expected.keys() ^ tensors.keys()):
        raise ValueError(f"{odd[0][:40]!r} is {'missing' if odd[0] in expected else 'no tensor of the network'}")
    for name, tensor in expected.items():
        if tensors[name].shape != tensor.shape:
            raise ValueError(f"{name!r} has shape {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
    if any(tensor.is_meta for tensor in expected.values()):
        module.to_empty(device="cpu")  # never elsewhere: buffers that are not saved would lose their numbers
    module.load_state_dict(tensors)
    return module


def check_finite(file: Path, tensors: dict[str, Tensor]) -> None:
    """Raise NonFiniteError, naming the tensor, where a weight is NaN or infinite."""
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NonFiniteError(f"{file}: tensor {name!r} holds a number that is NaN or infinite")


def _digest(card: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the card and the names, types, shapes and bytes of all tensors, in order of name."""
    summed = hashlib.sha256(card.encode())
    for name in sorted(tensors):
        summed.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        summed.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return summed.hexdigest()


def _readme(card: NetworkCard, about: dict[str, Any]) -> str:
    top1, source, teacher = (about.get(key) for key in ("top1", "imported", "teacher"))
    made = "trained with sakd." if source is None else "imported by sakd."
    when = " after the last epoch" if source is None else ""
    count = f"{about['images']} test images" if about.get("images") else "its test images"
    accuracy = "" if top1 is None else f" Top-1 on {count}{when}: {top1:.2f} %."
    learned = ""
    if teacher is not None:
        known = f", top-1 {teacher['top1']:.2f} %" if "top1" in teacher else ""
        learned = f"\nTeacher: {teacher['network']}{known}, SHA-256 `{teacher['sha256']}`.\n"
    if (friendly := about.get("friendly")) is not None:
        students = ", ".join(friendly["students"])
        learned = f"\nA student-friendly teacher, trained together with branches of {students}.\n"
    return (
        f"# {card.architecture} on {card.dataset}\n\n"
        f"An image classifier for {len(card.classes)} classes, {size_text(card.side)} pixels, "
        f"{made}{accuracy}\n"
        f"{learned}\n"
        "`model.safetensors` holds the weights, `config.json` the architecture, the class names and the mean and\n"
        "standard deviation of pixel values between 0 and 1 that the images are normalised with.\n\n"
        f"Pictures: {card.seen.text} (`preprocessing` in `config.json`).\n\n"
        f"SHA-256 of the weights: `{about['sha256']}`.\n\n"
        "    sakd eval .\n"
    )


def metadata_block(card: NetworkCard, facts: dict[str, Any], library: str, *tags: str) -> str:
    """The YAML block at the top of a README, as the hub's model cards have it.

    facts  top1 in percent, where it is known, and the number of test images
    """
    block: dict[str, Any] = {"library_name": library, "pipeline_tag": "image-classification"}
    block["tags"] = ["image-classification", "knowledge-distillation", "sakd", *tags]
    if (top1 := facts.get("top1")) is not None:
        dataset = {"name": card.dataset, "type": card.dataset, "split": "test"}
        metric = {"type": "accuracy", "name": "Top-1 (%)", "value": round(float(top1), 2)}
        result = {"task": {"type": "image-classification"}, "dataset": dataset, "metrics": [metric]}
        block |= {"metrics": ["accuracy"], "model-index": [{"name": card.architecture, "results": [result]}]}
    return f"---\n{yaml_bytes(block).decode()}---\n\n"


def timm_config(card: NetworkCard) -> dict[str, Any]:
    """Entries of config.json by which `timm.create_model("local-dir:FOLDER")` builds the network; none of others."""
    network, call = brought(card.architecture), card.library_call()
    if network is None or call is None or network.family != "timm":
        return {}
    name = str(network.arguments["entry"])
    if name.startswith(HUB):
        name = of_timm(name, "timm.models").load_model_config_from_hf(name.removeprefix(HUB))[1]
    height, width = height_width(card.side)
    shown = {
        "num_classes": len(card.classes),
        "input_size": [3, height, width],
        "mean": card.mean,
        "std": card.std,
        "interpolation": card.seen.interpolation,
        "crop_pct": min(height, width) / card.seen.resize,
        "crop_mode": "squash" if card.seen.resize_mode == "squash" else "center",
    }
    arguments = {key: value for key, value in call.arguments.items() if key not in ("pretrained", "num_classes")}
    about = {"architecture": name, "num_classes": len(card.classes), "label_names": card.classes}
    return about | {"pretrained_cfg": shown} | ({"model_args": arguments} if arguments else {})
