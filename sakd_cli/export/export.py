"""Write a trained network for programs that do not have sakd, and check what was written before anyone uses it."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sakd_cli.config.preprocessing import height_width, shown
from sakd_cli.config.resolve import ConfigSource
from sakd_cli.config.training import EvalConfig
from sakd_cli.data.loader import EvalLoader
from sakd_cli.documents.table import Check, Export, Latency
from sakd_cli.engine import checkpoint
from sakd_cli.engine.reporter import Reporter
from sakd_cli.errors import CheckpointError, DataError, UsageError
from sakd_cli.evaluation.speed import speed
from sakd_cli.export.formats import FORMS, Form, FromPixels, Function
from sakd_cli.files import read_json, sha256, whole_folder, write_aside, write_json
from sakd_cli.models import artifact, ensemble
from sakd_cli.models.artifact import NetworkCard
from sakd_cli.rundir import RunDir
from sakd_cli.runs.images import load_images
from sakd_cli.runs.locate import is_ensemble, run_of, settings_of
from sakd_cli.runs.scored import config_of

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


class Order(NamedTuple):
    """How it is to be exported.

    out         the folder to write; None: `export-FORM` in the run, or beside the weights
    overwrite   an export that is there goes first
    normalise   whether the file takes pixel values between 0 and 1 and normalises them itself, if its form can
    opset       of ONNX; None: the exporter's own
    """

    form: str
    out: Path | None = None
    overwrite: bool = False
    normalise: bool = True
    opset: int | None = None


def export(target: Path, order: Order, layers: list[ConfigSource], reporter: Reporter) -> Export:
    """Write the folder.

    Raises UsageError where it exists, a package is missing, the network does not fit the form, or the file's outputs
    differ from the network's by more than 1e-4 (then nothing is left).
    """
    form = FORMS[order.form]
    form.check()
    found = _found(target, reporter)
    base = found.run.path if found.run else target if target.is_dir() else target.parent
    folder = order.out or base / f"export-{order.form}"
    _check_place(folder, order.overwrite)
    config = config_of(found.card, [*settings_of(found.run), *layers], reporter)
    inside = order.normalise and form.inside
    images, real = _images(found.card, config, reporter)
    network = FromPixels(found.network, found.card.mean, found.card.std).eval() if inside else found.network
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (found.card.mean, found.card.std))
    given = images if inside else (images - mean) / std
    reporter.say(f"exporting {found.card.architecture} as {order.form}")
    with whole_folder(folder) as aside:
        form.write(network, given[:2].clone(), found.card, aside, order.opset)
        opened = form.opened(found.card, aside)
        document = Export(
            folder=str(folder),
            format=order.form,
            file=form.file,
            bytes=(aside / form.file).stat().st_size,
            sha256=sha256(aside / form.file),
            network=found.card.architecture,
            dataset=found.card.dataset,
            classes=len(found.card.classes),
            input="pixels" if inside else "normalised",
            check=_check(network, opened, given, real=real),
            latency=_latency(network, opened, found.card, config),
        )
        about = document.model_dump(exclude={"schema_", "folder", "classes"})
        write_json(aside / "config.json", {"export": FORMAT} | found.card.told() | about | found.facts)
        write_aside(aside / "README.md", model_card(found.card, found.facts, form, document).encode())
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
    weights = (run.ensemble or run.deliverable) if run is not None and run.path == target else target
    if weights is None:
        raise UsageError(f"{target}: this run has not saved a network yet")
    if is_ensemble(weights):
        whole = ensemble.load(weights if weights.is_dir() else weights.parent)
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
    about = _card_of(weights if weights.is_dir() else weights.parent)
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
    if _card_of(folder).get("export") != FORMAT:
        raise UsageError(f"{folder}: exists and is no export; it is not replaced", hint="--out DIR")
    if not overwrite:
        raise UsageError(f"{folder}: exists already", hint="--overwrite replaces it; --out DIR")


def _card_of(folder: Path) -> dict[str, Any]:
    """The `config.json` of a folder; empty where there is none that can be read."""
    try:
        about = read_json(folder / "config.json")
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _images(card: NetworkCard, config: EvalConfig, reporter: Reporter) -> tuple[Tensor, bool]:
    """[64, 3, side, side] in [0, 1] to check with, and whether they are test images; noise where none are at hand."""
    settings = config.data.model_copy(update={"validation": 0.0, "download": False})
    try:
        dataset = load_images(settings).dataset
        images, _ = next(iter(EvalLoader(dataset.test, dataset, device=torch.device("cpu"), batch_size=IMAGES)))
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (dataset.mean, dataset.std))
        if images.shape[-2:] == height_width(card.side):
            return (images * std + mean).clamp(0, 1), True
    except DataError as error:
        reporter.say(f"checked with noise: {error.message}")
    return torch.rand(IMAGES, 3, *height_width(card.side), generator=torch.Generator().manual_seed(0)), False


@torch.inference_mode()
def _check(network: nn.Module, opened: Function, images: Tensor, *, real: bool) -> Check:
    """Of all images as one batch, and of four one by one. Raises UsageError above the tolerance."""
    expected = network(images)
    singly = torch.cat([opened(image[None]) for image in images[:4]])
    found = opened(images)
    difference = max(float((found - expected).abs().max()), float((singly - expected[:4]).abs().max()))
    if not difference <= TOLERANCE:
        raise UsageError(f"the file's outputs differ by {difference:.2g} (at most {TOLERANCE:g}); nothing is written")
    same = 100 * float((found.argmax(1) == expected.argmax(1)).double().mean())
    return Check(images=len(images), difference=difference, agreement=same, real=real)


def _latency(network: nn.Module, opened: Function, card: NetworkCard, config: EvalConfig) -> Latency | None:
    if not config.timing_seconds:
        return None
    own, file = (
        speed(kind, card.side, torch.device("cpu"), batch=1, seconds=config.timing_seconds).latency
        for kind in (network, opened)
    )
    return Latency(threads=torch.get_num_threads(), network=own, file=file)


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
    timed = ""
    if (latency := document.latency) is not None:
        file = latency.file
        timed = f"{file.median:.2f} ms (quartiles {file.low:.2f} to {file.high:.2f}), in PyTorch "
        timed = f"- one image on the CPU that wrote it: {timed}{latency.network.median:.2f} ms\n"
    return f"""\
# {card.architecture} on {card.dataset}, {document.format}

An image classifier for {len(card.classes)} classes of RGB images of {shown(card.side)} pixels.
{known}
`{form.file}` takes {takes}; `config.json` has the class names in the order of the logits.
Pictures: {card.seen.text} (`preprocessing` in `config.json`). In this folder:

```python
{form.lines(card, inside)}
```

- pictures of more than 8 bits a channel are to be scaled to 8 bits before
- {document.bytes} bytes, SHA-256 `{document.sha256}`
- checked on {check.images} {kind}: logits within {check.difference:.1g} of the trained network,
  the same answer for {check.agreement:g} %
{timed}"""
