"""Write a trained network for programs that do not have sakd, and check what was written before anyone uses it."""

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sakd_cli.config.preprocessing import size_text
from sakd_cli.config.resolve import ConfigSource
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.decode import STRIP
from sakd_cli.documents.table import Accuracy, Check, Export, Latency
from sakd_cli.engine import checkpoint
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import CheckpointError, UsageError
from sakd_cli.evaluation.speed import speed
from sakd_cli.export.formats import CALIBRATION, FORMS, SOURCE, Form, FromPixels, Function, Precision, Writing
from sakd_cli.export.images import BATCH, UNKNOWN, Pictures, calibration_images, pictures_of
from sakd_cli.files import folder_of, read_about, read_json, sha256
from sakd_cli.models import artifact, ensemble
from sakd_cli.models.artifact import NetworkCard, metadata_block, timm_config
from sakd_cli.rundir import RunDir
from sakd_cli.runs.images import config_of
from sakd_cli.runs.locate import is_ensemble, require_intact, run_of, settings_of
from sakd_cli.writing import whole_folder, write_aside, write_json

FILES = {name for form in FORMS.values() for name in form.files}
FORMAT = Export.model_fields["schema_"].default
TOLERANCE = 1e-4  # largest difference of a logit
IMAGES = 64
FACTS = ("epoch", "split", "images", "top1", "top5", "loss", "imported", "friendly")  # of a deployable folder's card


class Exportable(NamedTuple):
    """What is to be exported: a network of the CPU in evaluation mode, its card, what is known of it, of which run."""

    network: nn.Module
    card: NetworkCard
    facts: dict[str, Any]
    run: RunDir | None


class ExportSettings(NamedTuple):
    """How it is to be exported.

    out         the folder to write; None: `export-FORM` in the run, or beside the weights
    overwrite   an export that is there goes first
    normalise   whether the file takes pixel values between 0 and 1 and normalises them itself, if its form can
    opset       of ONNX; None: the exporter's own
    precision   of its numbers; int8 is calibrated on training images
    max_drop    points of top-1 that the file may be worse than the network
    images      how many test images both are scored on at most
    """

    form: str
    out: Path | None = None
    overwrite: bool = False
    normalise: bool = True
    opset: int | None = None
    precision: Precision = "fp32"
    max_drop: float = 1.0
    images: int = 2000

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> "ExportSettings":
        """As the options of `sakd export` say. Raises UsageError where they exclude each other."""
        if options["fp16"] and options["int8"]:
            raise UsageError("--fp16 and --int8 exclude each other")
        return cls(
            form=options["format"],
            out=options["export_dir"],
            overwrite=options["replace"],
            normalise=not options["without_normalisation"],
            opset=options["opset"],
            precision="fp16" if options["fp16"] else "int8" if options["int8"] else "fp32",
            max_drop=options["max_drop"],
            images=options["score_images"],
        )

    @property
    def reduced(self) -> bool:
        """Whether its numbers are shorter than the network's."""
        return self.precision != "fp32"


def export(target: Path, order: ExportSettings, layers: list[ConfigSource], reporter: Reporter) -> Export:
    """Write the folder.

    Raises UsageError where it exists, a package is missing, the network does not fit the form, the outputs of a file in
    fp32 differ from the network's by more than 1e-4, or its top-1 is lower by more than `max_drop` (nothing is left).
    """
    form = FORMS[order.form]
    form.check()
    if order.precision == "int8" and not form.int8:
        fit = ", ".join(name for name, one in FORMS.items() if one.int8)
        raise UsageError(f"--int8: {order.form} has no 8-bit form", f"--format {fit}")
    if order.opset is not None and "onnx" not in form.needs:
        raise UsageError(f"--opset: {order.form} is not written as ONNX", "--format onnx, openvino")
    found = _found(target, reporter)
    name = "-".join(["export", order.form, order.precision][: 2 + order.reduced])
    folder = order.out or (found.run.path if found.run else folder_of(target)) / name
    _check_place(folder, order.overwrite)
    config = config_of(found.card, [*settings_of(found.run), *layers], reporter)
    pictures = pictures_of(target, found.run, found.card, config, layers, reporter)
    inside = order.normalise and form.inside
    network = FromPixels(found.network, found.card.mean, found.card.std).eval() if inside else found.network
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (found.card.mean, found.card.std))

    def given(pixels: Tensor) -> Tensor:
        return pixels if inside else (pixels - mean) / std

    calibration: list[Tensor] = []
    if order.precision == "int8":
        source = calibration_images(found.run, found.card, config, pictures, reporter)
        calibration = [given(pixels) for pixels, _ in source.batches(CALIBRATION)]
    reporter.say(f"exporting {found.card.architecture} as {order.form}, {order.precision}")
    with whole_folder(folder) as aside:
        first = given(torch.cat([pixels for pixels, _ in pictures.batches(IMAGES)]))
        form.write(network, first[:2].clone(), found.card, aside, Writing(order.opset, order.precision, calibration))
        opened = form.opened(found.card, aside)
        document = Export(
            folder=str(folder),
            format=order.form,
            precision=order.precision,
            file=form.file,
            bytes=sum((aside / name).stat().st_size for name in form.files),
            network_bytes=sum(tensor.nbytes for tensor in found.network.state_dict().values()),
            sha256=sha256(aside / form.file),
            network=found.card.architecture,
            dataset=found.card.dataset,
            classes=len(found.card.classes),
            input="pixels" if inside else "normalised",
            calibration=sum(map(len, calibration)),
            check=_check(network, opened, first, real=pictures.split is not None, exact=not order.reduced),
            accuracy=_accuracy(network, opened, pictures, given, order),
            latency=_latency(network, opened, found.card, config, reporter),
        )
        of_timm = timm_config(found.card) if order.form == "safetensors" else {}
        library = "timm" if of_timm else form.library
        block = metadata_block(found.card, found.facts, library, order.form, order.precision)
        about = found.card.config_entries() | document.model_dump(exclude={"schema_", "folder", "classes"})
        write_json(aside / "config.json", {"export": FORMAT} | about | found.facts | of_timm)
        write_aside(aside / "README.md", (block + model_card(found.card, found.facts, form, document)).encode())
    return document


def _found(target: Path, reporter: Reporter) -> Exportable:
    """The network that a path means; of a run that is not finished, its last checkpoint's."""
    run = run_of(target)
    unfinished = run is not None and run.path == target and not run.finished
    if run is not None and unfinished and (saved := _last_checkpoint(run, reporter)) is not None:
        step = f"epoch {saved.state.get('epoch')}, step {saved.state.get('step')}"
        reporter.say(f"{target}: is not finished; taking its last checkpoint ({step})")
        loaded = artifact.load(saved.folder / checkpoint.MODEL)
        return Exportable(loaded.model.eval(), loaded.card, {"unfinished": step}, run)
    require_intact(run)
    weights = (run.ensemble or run.require_deliverable()) if run is not None and run.path == target else target
    if is_ensemble(weights):
        whole = ensemble.load(folder_of(weights))
        names = "+".join(str(getattr(member, "name", "")) for member in whole.ensemble.members)
        return Exportable(whole.ensemble.eval(), whole.card._replace(architecture=names), {}, run)
    loaded = artifact.load(weights)
    return Exportable(loaded.model.eval(), loaded.card, _facts(weights, loaded.sha256), run)


def _last_checkpoint(run: RunDir, reporter: Reporter) -> checkpoint.Checkpoint | None:
    """The newest whole one, which is only read: another process may be writing the next."""
    for name in ("last", "last.new", "previous"):
        folder = run.path / "checkpoints" / name
        if not folder.is_dir():
            continue
        try:
            saved = checkpoint.read(folder)
            if saved.model is not None and saved.state.get("run") == run.identity:
                return saved
            reporter.warn(f"{folder}: belongs to another run")
        except CheckpointError as error:
            reporter.warn(error.message)
    return None


def _facts(weights: Path, digest: str) -> dict[str, Any]:
    """What the card beside the weights says of them: figures, and the teacher."""
    about = read_about(folder_of(weights))
    if about.get("sha256") != digest:
        return {"weights": digest}
    facts = {key: about[key] for key in FACTS if key in about}
    if isinstance(teacher := about.get("teacher"), dict):
        facts["teacher"] = {key: teacher.get(key) for key in ("network", "sha256", "top1")}
    return facts | {"weights": digest}


def _check_place(folder: Path, overwrite: bool) -> None:
    """Raise UsageError where something is there that is not to be replaced."""
    if not (folder.exists() or folder.is_symlink()):
        return
    about = None
    with suppress(OSError, ValueError):
        about = read_json(folder / "config.json")
    if not isinstance(about, dict) or about.get("export") != FORMAT:
        raise UsageError(f"{folder}: exists and is no export; it is not replaced", hint="--out DIR")
    if not overwrite:
        raise UsageError(f"{folder}: exists already", hint="--overwrite replaces it; --out DIR")
    if own := sorted({one.name for one in folder.iterdir()} - {"config.json", "README.md", SOURCE, *FILES}):
        raise UsageError(f"{folder}: is not replaced, {own[0]} in it is no part of an export", hint="--out DIR")


@torch.inference_mode()
def _check(network: nn.Module, opened: Function, images: Tensor, *, real: bool, exact: bool) -> Check:
    """Of all images as one batch, and of four one by one.

    exact  the logits must be the network's to within the tolerance. Raises UsageError where they are not, or no numbers
    """
    expected = network(images)
    singly = torch.cat([opened(image[None]) for image in images[:4]])
    found = opened(images)
    difference = max(float((found - expected).abs().max()), float((singly - expected[:4]).abs().max()))
    if not difference <= (TOLERANCE if exact else float("inf")) or not math.isfinite(difference):
        most = f"at most {TOLERANCE:g}" if exact else "a weight or a value is too large"
        raise UsageError(f"the file's outputs differ by {difference:.2g} ({most}); nothing is written")
    same = 100 * float((found.argmax(1) == expected.argmax(1)).double().mean())
    return Check(images=len(images), difference=difference, agreement=same, real=real)


@torch.inference_mode()
def _accuracy(
    network: nn.Module, opened: Function, pictures: Pictures, given: Callable[[Tensor], Tensor], order: ExportSettings
) -> Accuracy | None:
    """Top-1 of both on the labelled images; None without. UsageError where it falls by more than is allowed."""
    right = torch.zeros(2, dtype=torch.int64)
    images = 0
    for pixels, labels in pictures.batches(order.images):
        known = labels != UNKNOWN
        if bool(known.any()):
            shown, truth = given(pixels[known]), labels[known]
            right += torch.stack([(answer(shown).argmax(1) == truth).sum() for answer in (network, opened)])
            images += len(truth)
    if not images:
        return None
    before, after = (100 * right.double() / images).tolist()
    if not before - after <= order.max_drop + 1e-9:  # nan allows nothing
        raise UsageError(
            f"{order.precision}: top-1 falls from {before:.2f} to {after:.2f} % on {images} images, by more than "
            f"{order.max_drop:g} points; nothing is written",
            hint="--max-drop POINTS allows it",
        )
    return Accuracy(images=images, before=before, after=after)


def _latency(
    network: nn.Module, opened: Function, card: NetworkCard, config: EvalConfig, reporter: Reporter
) -> Latency | None:
    if not config.timing_seconds:
        return None
    reporter.say(f"timing network and file for {4 * config.timing_seconds:g} s or more")
    own, file = (
        speed(kind, card.side, torch.device("cpu"), batch=BATCH, seconds=config.timing_seconds)
        for kind in (network, opened)
    )
    if busy := [one for one in (own, file) if one.disturbed]:
        reporter.warn(f"busy machine: others used {busy[0].busy:.1f} of {busy[0].cores} cores; the times are too long")
    return Latency(
        threads=torch.get_num_threads(),
        network=own.latency,
        file=file.latency,
        network_throughput=own.throughput,
        file_throughput=file.throughput,
    )


def model_card(card: NetworkCard, facts: dict[str, Any], form: Form, document: Export) -> str:
    """README.md of an export: what it is, the lines that load it, and what was checked.

    facts  metrics and teacher, as `config.json` has them
    """
    check, teacher, top1 = document.check, facts.get("teacher"), facts.get("top1")
    inside = document.input == "pixels"
    takes = "pixel values between 0 and 1, and normalises them itself" if inside else "normalised pixel values"
    kind = "images of its test set" if check.real else "images of noise"
    known = "" if top1 is None else f"Top-1 on {facts.get('images') or 'its'} test images: {top1:.2f} %.\n"
    if "unfinished" in facts:
        known += f"From a training that was not finished ({facts['unfinished']}).\n"
    if teacher is not None:
        known += f"It learned from {teacher['network']}, SHA-256 `{teacher['sha256']}`.\n"
    return f"""\
# {card.architecture} on {card.dataset}, {document.format}

An image classifier for {len(card.classes)} classes of RGB images of {size_text(card.side)} pixels.
{known}
`{form.file}` takes {takes}; `config.json` has the class names in the order of the logits.
Pictures: {card.seen.text} (`preprocessing` in `config.json`). In this folder:

```python
{form.lines(card, inside)}
```

- pictures of more than 8 bits a channel are to be scaled to 8 bits before; of those that are more than {STRIP} times
  longer than wide, only the middle, {STRIP} times as long, is to be taken
- {document.bytes} bytes in {document.precision} (the network in PyTorch: {document.network_bytes}), SHA-256 of
  `{document.file}`: `{document.sha256}`
- checked on {check.images} {kind}: logits within {check.difference:.1g} of the trained network,
  the same answer for {check.agreement:g} %
{_measured(document)}"""


def _measured(document: Export) -> str:
    """Lines of a card: accuracy and speed before and after."""
    text = f"- calibrated on {document.calibration} images\n" if document.calibration else ""
    if (accuracy := document.accuracy) is not None:
        text += f"- top-1 on {accuracy.images} images: {accuracy.after:.2f} %, of the network in PyTorch "
        text += f"{accuracy.before:.2f} %\n"
    if (latency := document.latency) is not None:
        file = latency.file
        text += f"- one image on the CPU that wrote it ({latency.threads} threads): {file.median:.2f} ms (quartiles "
        text += f"{file.low:.2f} to {file.high:.2f}), in PyTorch {latency.network.median:.2f} ms\n"
        ours, theirs = (1000 * BATCH / one.median for one in (latency.file_throughput, latency.network_throughput))
        text += f"- {BATCH} images there: {ours:.2f} ms, in PyTorch {theirs:.2f} ms\n"
    return text
