"""What a network costs: parameters and multiply-accumulates."""

import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """parameters: weights and biases; macs: multiply-accumulates of convolutions and linear layers for one image."""

    parameters: int
    macs: int


def cost(model: nn.Module, side: int) -> Cost:
    """Counted on the meta device, so that nothing is computed. `side`: height and width of the image in pixels."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    ghost = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        ghost(torch.empty(1, 3, side, side, device="meta"))
    return Cost(parameters, counter.get_total_flops() // 2)
