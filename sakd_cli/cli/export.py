"""`sakd export`: a trained network for programs that do not have sakd."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.resolve import config_sources
from sakd_cli.runs.locate import runs_dir_of, target_or_newest

Target = Annotated[
    Path | None,
    typer.Argument(metavar="RUN", help="Run directory, folder of a network, or its file. Default: newest run."),
]


@with_options("export")
def export(options: Values, json: bool, quiet: bool, target: Target = None) -> None:
    """Export a network for other programs, check its outputs, and explain how to load it there.

    Of a run that is not finished, the network of its last checkpoint is exported.

    Examples:

        sakd export --format onnx

        sakd export runs/20261121-120000-distill-... --format pt2 --out classifier
    """
    sources = config_sources(options)
    where = target_or_newest(target, runs_dir_of(sources))
    from sakd_cli.export.export import Order
    from sakd_cli.export.export import export as carry_out

    order = Order(*(options[name] for name in ("format", "export_dir", "replace", "normalisation", "opset")))
    document = carry_out(where, order, sources, ConsoleReporter(quiet=quiet))
    if json:
        emit(document)
        return
    check, latency = document.check, document.latency
    show(
        f"{document.network} as {document.format}: {document.bytes / 1e6:.2f} MB, logits within "
        f"{check.difference:.1g} on {check.images} images{'' if check.real else ' of noise'}"
    )
    if latency is not None:
        file, network = latency.file.median, latency.network.median
        show(f"one image on this CPU: {file:.2f} ms, in PyTorch {network:.2f} ms")
    show(f"folder: {document.folder} (README.md says how to load it)")
