"""What KDSVD needs beside the contract of distillers: singular vectors whose gradient is right and finite."""

import pytest
import torch
from torch import Tensor

from sakd_cli.distillers.kdsvd import main_directions, matched, oriented


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def turned_by_sign(x: Tensor, count: int) -> Tensor:
    """Any smooth function of the vectors that their signs do not change."""
    v, _ = main_directions(x, count)
    wave = torch.arange(v.shape[1] * v.shape[1] * v.shape[2], dtype=v.dtype).cos().reshape(v.shape[1], v.shape[1], -1)
    return ((v[:, :, None] * v[:, None, :]) * wave).sum()


@pytest.mark.parametrize("shape", [(2, 6, 4, 4), (2, 9, 2, 2), (3, 4, 2, 2), (1, 5, 1, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_the_gradient_is_that_of_the_vectors(shape: tuple[int, ...], count: int) -> None:
    x = maps(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: turned_by_sign(x, count), x, eps=1e-6, atol=1e-6)


def test_dead_channels_leave_value_and_gradient_right() -> None:
    """PyTorch's own gradient is NaN there."""
    x = maps(2, 6, 4, 4)
    dead = torch.tensor([1.0, 0, 1, 0, 0, 1]).double()[:, None, None]
    leaf = (x * dead).requires_grad_()
    (gradient,) = torch.autograd.grad(turned_by_sign(leaf, 2), leaf)
    assert gradient.isfinite().all()
    assert torch.autograd.gradcheck(lambda y: turned_by_sign(y, 2), leaf, eps=1e-6, atol=1e-6)
    v = torch.linalg.svd(leaf.flatten(2).mT, full_matrices=False).Vh.mT[..., :2]
    (theirs,) = torch.autograd.grad(v.square().sum(dim=2).prod(dim=1).sum() + v.pow(4).sum(), leaf)
    assert theirs.isnan().any(), "then our own gradient is no longer needed"


@pytest.mark.parametrize("kind", ["zero", "one channel", "equal values"])
def test_degenerate_maps_keep_value_and_gradient_finite(kind: str) -> None:
    x = torch.zeros(2, 4, 2, 2, dtype=torch.float64)
    if kind == "one channel":
        x[:, 1] = 3.0
    if kind == "equal values":
        x.copy_(torch.eye(4).reshape(4, 2, 2))
    for dtype in (torch.float64, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        loss = turned_by_sign(leaf, 4)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert gradient.isfinite().all()


def test_signs_follow_the_largest_entry_and_the_teacher() -> None:
    v = torch.tensor([[[0.6, 0.8], [-0.8, 0.6]]])
    assert torch.equal(oriented(v), torch.tensor([[[-0.6, 0.8], [0.8, 0.6]]]))
    assert torch.equal(oriented(-v), oriented(v))
    teacher = torch.tensor([[[0.0], [1.0]]])
    assert torch.equal(matched(v, teacher), torch.tensor([[[-0.6], [0.8]]]))
    positive, _ = main_directions(maps(3, 5, 4, 4).abs(), 1)
    assert (oriented(positive) > 0).all(), "behind a ReLU the first vector is of one sign"
