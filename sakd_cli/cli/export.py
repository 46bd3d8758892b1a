"""`sakd export`: a trained network for programs that do not have sakd."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options

Target = Annotated[
    Path | None,
    typer.Argument(metavar="RUN", help="Run directory, folder of a network, or its file. Default: newest run."),
]


@with_options("export")
def export(options: Values, json: bool, quiet: bool, target: Target = None) -> None:
    """Export a network for other programs, check its outputs, and explain how to load it there.

    Of a run that is not finished, the network of its last checkpoint is exported.

    Examples:

        sakd export --format onnx --int8

        sakd export runs/20261121-120000-distill-... --format pt2 --out classifier
    """
    document = api.export(target, reporter=ConsoleReporter(quiet=quiet), **options)
    if json:
        emit(document)
        return
    check, accuracy, latency = document.check, document.accuracy, document.latency
    show(
        f"{document.network} as {document.format}, {document.precision}: {document.bytes / 1e6:.2f} MB (in PyTorch "
        f"{document.network_bytes / 1e6:.2f}), logits within {check.difference:.1g} on {check.images} images"
        f"{'' if check.real else ' of noise'}"
    )
    if accuracy is not None:
        show(f"top-1 on {accuracy.images} images: {accuracy.after:.2f} %, in PyTorch {accuracy.before:.2f} %")
    if latency is not None:
        file, network = latency.file.median, latency.network.median
        show(f"one image on this CPU: {file:.2f} ms, in PyTorch {network:.2f} ms")
        many, own = latency.file_throughput, latency.network_throughput
        show(f"in batches of {many.batch}: {many.median:.0f} images a second, in PyTorch {own.median:.0f}")
    show(f"folder: {document.folder} (README.md says how to load it)")
