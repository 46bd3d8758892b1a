"""`sakd import-weights`: the only way in for weights that another program has trained."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options
from sakd_cli.config.resolve import config_sources, resolve

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="PyTorch (.pth, .pt) or .safetensors file of a state dict.")
]


@with_options("import-weights")
def import_weights(
    options: Values, json: bool, quiet: bool, network: str, import_dir: Path | None, file: FileArgument
) -> None:
    """Convert weights of another program (RepDistiller, mdistiller) to a folder for --teacher, and evaluate them.

    The file is read as plain tensors only; every tensor of the network is filled exactly once.

    Examples:

        sakd import-weights resnet32x4.pth --model resnet32x4 --dataset cifar100

        sakd distill --teacher resnet32x4-cifar100 --student resnet8x4
    """
    config = resolve("eval", config_sources(options)).config
    from sakd_cli.export.import_weights import import_weights as carry_out

    result = carry_out(file, network, config, import_dir, ConsoleReporter(quiet=quiet))
    if json:
        emit(result)
        return
    scored = "not scored" if result.top1 is None else f"top-1 {result.top1:.2f} % on {result.images} test images"
    show(f"{result.network} for the {result.classes} classes of {result.dataset}: {scored}")
    show(f"folder: {result.folder}")
