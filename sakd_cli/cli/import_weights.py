"""`sakd import-weights`: the only way in for weights that another program has trained."""

from pathlib import Path
from typing import Annotated

import typer

from sakd_cli import api
from sakd_cli.cli.console import ConsoleReporter, emit, show
from sakd_cli.cli.options import Values, with_options

FileArgument = Annotated[
    Path, typer.Argument(metavar="FILE", help="PyTorch (.pth, .pt) or .safetensors file of a state dict.")
]


@with_options("import-weights")
def import_weights(options: Values, json: bool, quiet: bool, file: FileArgument) -> None:
    """Convert weights of another program (RepDistiller, mdistiller) to a folder for --teacher, and evaluate them.

    The file is read as plain tensors only; every tensor of the network is filled exactly once. The weights are found
    wherever the trainer has put them; what is left in the file is told.

    Examples:

        sakd import-weights save/models/resnet32x4_vanilla/ckpt_epoch_240.pth

        sakd import-weights model_best.pth.tar --model timm/resnet18 --key state_dict_ema --classes order.txt

        sakd distill --teacher resnet32x4-cifar100 --student resnet8x4
    """
    result = api.import_weights(file, reporter=ConsoleReporter(quiet=quiet), **options)
    if json:
        emit(result)
        return
    scored = "not scored" if result.top1 is None else f"top-1 {result.top1:.2f} % on {result.images} test images"
    show(f"{result.network} for the {result.classes} classes of {result.dataset}: {scored}")
    show(f"folder: {result.folder}")
