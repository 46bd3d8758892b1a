"""How the value between two stages holds a map: as planes, as pixels, or as tokens, some of which are of no place."""

from typing import Literal, NamedTuple, final

import torch
from torch import Tensor, nn


class Layout(NamedTuple):
    """planes: [N, C, H, W], the map itself. pixels: [N, H, W, C]. tokens: [N, prefix + H W, C], row by row.

    The `prefix` tokens (class token, distillation token, registers) are of the whole image. A map has no room for them:
    they stay in the value that the network hands on, and only what stands for it at a spot is without them.
    """

    form: Literal["planes", "pixels", "tokens"] = "planes"
    prefix: int = 0

    def to_map(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What a spot sees of the value: the map [N, C, H, W]; `shape` is (C, H, W). A view, no copy."""
        if self.form == "pixels":
            return x.permute(0, 3, 1, 2)
        if self.form == "tokens":
            return x[:, self.prefix :].transpose(1, 2).unflatten(2, shape[1:])
        return x

    def from_map(self, x: Tensor) -> Tensor:
        """A map [N, C, H, W] of another network as the value that this one goes on with.

        Its prefix tokens are the mean of its own: nothing of the network it enters is used, so that all of what the
        router sees behind a change of networks has come through the adapter. The paper has no networks with tokens.
        """
        if self.form == "pixels":
            return x.permute(0, 2, 3, 1)
        if self.form == "tokens":
            tokens = x.flatten(2).transpose(1, 2)
            whole = tokens.mean(dim=1, keepdim=True).expand(-1, self.prefix, -1)
            return torch.cat([whole, tokens], dim=1) if self.prefix else tokens
        return x


PLANES = Layout()


@final
class ToMap(nn.Module):
    """`Layout.to_map` as a module, for chains of them."""

    def __init__(self, layout: Layout, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layout, self.shape = layout, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.layout.to_map(x, self.shape)


@final
class FromMap(nn.Module):
    """`Layout.from_map` as a module."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return self.layout.from_map(x)
