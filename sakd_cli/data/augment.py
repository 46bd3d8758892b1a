"""Augmentation of a whole batch at once, where the images live; every shape is fixed, nothing is read by the host."""

import torch
from torch import Tensor
from torch.nn import functional


def pad(images: Tensor, padding: int) -> Tensor:
    """[N, 3, H, W] -> [N, 3, H + 2 padding, W + 2 padding] with a border of zeros (black), in the images' own type."""
    return functional.pad(images, (padding, padding, padding, padding)).contiguous()


def crop_and_flip(padded: Tensor, index: Tensor, dy: Tensor, dx: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """Take the samples at `index`, cut each at its own offset, mirror those that `flip` names.

    padded      [N, 3, H + 2 padding, W + 2 padding]  uint8, contiguous, from `pad`
    index       [B]  int64 row of `padded`
    dy, dx      [B]  int64 upper left corner of the crop, 0 .. 2 padding; `padding` is the image as it was
    flip        [B]  bool, left and right exchanged
    returns     [B, 3, H, W] uint8

    One gather by computed addresses: only the pixels that are kept are read, and mirroring is part of the address.
    """
    _, channels, rows, columns = padded.shape
    height, width = rows - 2 * padding, columns - 2 * padding
    along = torch.arange(width, device=padded.device)
    x = torch.where(flip[:, None], width - 1 - along, along) + dx[:, None]
    y = torch.arange(height, device=padded.device) + dy[:, None]
    plane = index[:, None] * channels + torch.arange(channels, device=padded.device)
    address = (plane[:, :, None, None] * rows + y[:, None, :, None]) * columns + x[:, None, None, :]
    return padded.view(-1).index_select(0, address.view(-1)).view(address.shape)


def constants(values: tuple[float, float, float], device: torch.device) -> Tensor:
    """One number per channel as [3, 1, 1] on the device, for `normalise`; of torch's default type, as weights are."""
    return torch.tensor(values, device=device).view(3, 1, 1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, 3, H, W] -> (pixels / 255 - mean) / std, of the type of mean and std [3, 1, 1].

    The operations of torchvision's ToTensor and Normalize in their order: in float32 bit for bit the same.
    """
    return images.to(mean.dtype).div_(255).sub_(mean).div_(std)
