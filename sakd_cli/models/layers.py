"""Pieces that several families are made of."""

import math

from torch import Tensor, nn


class GlobalPool(nn.Module):
    """Mean over all positions: [N, C, H, W] to [N, C]."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """Convolution 3x3, padding 1, no bias."""
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


def init_kaiming(model: nn.Module) -> None:
    """Convolutions Kaiming-normal by fan-out (CIFAR ResNets of the CRD benchmark)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def init_fan_out(model: nn.Module) -> None:
    """Convolutions normal with variance 2 / (k^2 C_out), biases zero (wide ResNets of the CRD benchmark)."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
            nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))
        if isinstance(module, nn.Conv2d | nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
