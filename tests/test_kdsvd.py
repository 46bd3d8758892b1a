"""What KDSVD needs beside the contract of distillers: singular vectors whose gradient is right and finite."""

import pytest
import torch
from torch import Tensor

from sakd_cli.distillers.kdsvd import main_directions, matched, oriented


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


WAYS = pytest.mark.parametrize("lapack", [False, True], ids=["products", "lapack"])


def turned_by_sign(x: Tensor, count: int, *, lapack: bool) -> Tensor:
    """Any smooth function of the vectors that their signs do not change."""
    v, _ = main_directions(x, count, lapack=lapack)
    wave = torch.arange(v.shape[1] * v.shape[1] * v.shape[2], dtype=v.dtype).cos().reshape(v.shape[1], v.shape[1], -1)
    return ((v[:, :, None] * v[:, None, :]) * wave).sum()


@pytest.mark.parametrize("shape", [(1, 6, 4, 4), (2, 9, 2, 2), (3, 4, 2, 2), (1, 5, 1, 3)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
@WAYS
def test_the_gradient_is_that_of_the_vectors(shape: tuple[int, ...], count: int, lapack: bool) -> None:
    x = maps(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: turned_by_sign(x, count, lapack=lapack), x, eps=1e-6, atol=1e-6)


@WAYS
def test_dead_channels_leave_value_and_gradient_right(lapack: bool) -> None:
    """PyTorch's own gradient is NaN there."""
    x = maps(1, 6, 4, 4)
    dead = torch.tensor([1.0, 0, 1, 0, 0, 1]).double()[:, None, None]
    leaf = (x * dead).requires_grad_()
    (gradient,) = torch.autograd.grad(turned_by_sign(leaf, 2, lapack=lapack), leaf)
    assert gradient.isfinite().all()
    assert torch.autograd.gradcheck(lambda y: turned_by_sign(y, 2, lapack=lapack), leaf, eps=1e-6, atol=1e-6)
    v = torch.linalg.svd(leaf.flatten(2).mT, full_matrices=False).Vh.mT[..., :2]
    (theirs,) = torch.autograd.grad(v.square().sum(dim=2).prod(dim=1).sum() + v.pow(4).sum(), leaf)
    assert theirs.isnan().any(), "then our own gradient is no longer needed"


@pytest.mark.parametrize("kind", ["zero", "one channel", "equal values"])
@WAYS
def test_degenerate_maps_keep_value_and_gradient_finite(kind: str, lapack: bool) -> None:
    x = torch.zeros(2, 4, 2, 2, dtype=torch.float64)
    if kind == "one channel":
        x[:, 1] = 3.0
    if kind == "equal values":
        x.copy_(torch.eye(4).reshape(4, 2, 2))
    for dtype in (torch.float64, torch.float32):
        leaf = x.to(dtype).requires_grad_()
        loss = turned_by_sign(leaf, 4, lapack=lapack)
        (gradient,) = torch.autograd.grad(loss, leaf)
        assert loss.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("shape", [(3, 32, 8, 8), (2, 64, 4, 4)], ids=["tall", "wide"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_products_find_what_lapack_finds_to_rounding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (maps(*shape) + 0.5).relu().to(dtype).requires_grad_()
    found = []
    for lapack in (False, True):
        v, values = main_directions(x, 4, lapack=lapack)
        (gradient,) = torch.autograd.grad(turned_by_sign(x, 4, lapack=lapack), x)
        found.append((oriented(v), values, gradient))
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).abs().max() <= (1e-11 if dtype == torch.float64 else 1e-4) * theirs.abs().max()


@WAYS
@pytest.mark.parametrize("gap", [0.0, 1e-15, 1e-11, 1e-7])
def test_values_close_to_each_other_are_told_apart_or_left_out(gap: float, lapack: bool) -> None:
    """Behind the vectors that are asked for and among them; 1e-15 is closer than rounding."""
    square = maps(1, 1, 6, 6)[0, 0]
    values = torch.tensor([3.0, 2, 2 - gap, 1, 0, 0], dtype=torch.float64)
    x = torch.linalg.qr(square).Q * values @ torch.linalg.qr(square.T).Q
    leaf = x[None, :, None].requires_grad_()
    for count in (2, 3):
        v, values = main_directions(leaf, count, lapack=lapack)
        assert values.tolist()[0] == pytest.approx([3, 2, 2 - gap][:count], rel=1e-14)
        assert (v[0].mT @ v[0] - torch.eye(count)).abs().max() < 1e-12
        loss = (v[..., :1] @ v[..., :1].mT).flatten() @ torch.arange(36).double().cos()
        (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
        (all_of_them,) = torch.autograd.grad(turned_by_sign(leaf, count, lapack=lapack), leaf)
        assert first.abs().max() < 10, "the first has no equal"
        assert all_of_them.abs().max() < (10 / gap if gap > 1e-14 else 1e14)


def test_signs_follow_the_largest_entry_and_the_teacher() -> None:
    v = torch.tensor([[[0.6, 0.8], [-0.8, 0.6]]])
    assert torch.equal(oriented(v), torch.tensor([[[-0.6, 0.8], [0.8, 0.6]]]))
    assert torch.equal(oriented(-v), oriented(v))
    teacher = torch.tensor([[[0.0], [1.0]]])
    assert torch.equal(matched(v, teacher), torch.tensor([[[-0.6], [0.8]]]))
    positive, _ = main_directions(maps(3, 5, 4, 4).abs(), 1, lapack=True)
    assert (oriented(positive) > 0).all(), "behind a ReLU the first vector is of one sign"
