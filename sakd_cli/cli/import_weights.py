"""`sakd import-weights`: the only way in for weights that another program has trained."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, completion, with_options
from sakd_cli.config.resolve import config_sources, resolve

FileArgument = Annotated[Path, typer.Argument(help="PyTorch (.pth, .pt) or .safetensors file of a state dict.")]
Model = Annotated[
    str, typer.Option(help="Network that the weights are of.", autocompletion=completion("models"), show_default=False)
]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder to write (MODEL-DATASET, here).", rich_help_panel="Output")
]


@with_options("import-weights")
def import_weights(options: Values, json: bool, quiet: bool, file: FileArgument, model: Model, out: Out = None) -> None:
    """Make a folder for --teacher from weights of another program (RepDistiller, mdistiller), and score them.

    The file is read as plain tensors or not at all; every tensor of the network is filled exactly once.

    Examples:

        sakd import-weights resnet32x4.pth --model resnet32x4 --dataset cifar100

        sakd distill --teacher resnet32x4-cifar100 --student resnet8x4
    """
    words = {key: value for key, value in options.items() if key != "model"}
    config = resolve("eval", config_sources(words)).config
    talk = ConsoleReporter(quiet=quiet)
    from sakd_cli.export.import_weights import import_weights as carry_out

    result = carry_out(file, model, config, out, talk)
    if json:
        emit(result)
        return
    top1 = result["top1"]
    scored = "not scored" if top1 is None else f"top-1 {top1:.2f} % on {result['images']} test images"
    show(f"{result['network']} for the {result['classes']} classes of {result['dataset']}: {scored}")
    show(f"folder: {result['folder']}")
