"""Modules that translate one network's feature into the shape of the other's (sakd spec, section 3.2)."""

from typing import final

from torch import Tensor, nn

from sakd_cli.models.staged import Shape


@final
class ConvAdapter(nn.Module):
    """One convolution with bias, BatchNorm and, unless told otherwise, ReLU: [N, C1, H1, W1] to [N, C2, H2, W2].

    Geometry by the heights, tested in this order: half -> 3x3 stride 2; double -> transposed 4x4 stride 2; smaller or
    equal -> kernel (1 + H1 - H2), 1x1 where equal; larger -> transposed with stride floor(H2 / H1).
    """

    def __init__(self, source: Shape, target: Shape, *, relu: bool = True) -> None:
        super().__init__()
        (c1, h1, w1), (c2, h2, w2) = source, target
        if h1 == 2 * h2:
            self.conv: nn.Module = nn.Conv2d(c1, c2, 3, 2, 1)
            self.geometry = "conv 3x3 /2"
        elif 2 * h1 == h2:
            self.conv = nn.ConvTranspose2d(c1, c2, 4, 2, 1)
            self.geometry = "up-conv 4x4 x2"
        elif h1 >= h2:
            kernel = (1 + h1 - h2, 1 + w1 - w2)
            self.conv = nn.Conv2d(c1, c2, kernel)
            self.geometry = f"conv {kernel[0]}x{kernel[1]}"
        else:
            stride = h2 // h1
            kernel = (h2 - stride * (h1 - 1), w2 - stride * (w1 - 1))
            self.conv = nn.ConvTranspose2d(c1, c2, kernel, stride)
            self.geometry = f"up-conv {kernel[0]}x{kernel[1]} x{stride}"
        self.norm = nn.BatchNorm2d(c2)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.norm(self.conv(x)))


@final
class LinearAdapter(nn.Module):
    """One linear layer with bias: [N, C1] to [N, C2]."""

    geometry = "linear"

    def __init__(self, source: Shape, target: Shape) -> None:
        super().__init__()
        self.linear = nn.Linear(source[0], target[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


def adapter(source: Shape, target: Shape) -> ConvAdapter | LinearAdapter:
    """The routing adapter between two features: convolutional for maps, linear for pooled vectors; never identity."""
    return ConvAdapter(source, target) if len(source) == 3 else LinearAdapter(source, target)
