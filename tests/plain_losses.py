"""Every method's loss as its paper writes it, without a thought for speed: the yardstick of `test_distillers.py`.

A loss gets the distiller (for its layers and drawings), the spot's number, the rows of student and teacher, their
labels and their numbers in the training split. Its numbers are the defaults of the method.
"""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[Tensor, Tensor]


class Plain(NamedTuple):
    """What a method is compared with.

    before  is applied to the whole batch at all spots, where a method has a layer that sees all of it
    counted the samples [K, N] that a loss has, of those that are chosen at each spot
    """

    loss: Callable[..., Tensor]
    before: Callable[[Any, list[Pair]], list[Pair]] = lambda d, pairs: pairs
    counted: Callable[[Tensor], Tensor] = lambda rows: rows


def unit(x: Tensor) -> Tensor:
    return x / x.norm()


def smaller(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    side = min(s.shape[-1], t.shape[-1])
    return F.adaptive_avg_pool2d(s, side), F.adaptive_avg_pool2d(t, side)


def mean(values: Any) -> Tensor:
    return torch.stack(list(values)).mean()


def kl(t: Tensor, s: Tensor) -> Tensor:
    return (t * (t / s).log()).sum()


def kd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return mean(16 * kl((b / 4).softmax(0), (a / 4).softmax(0)) for a, b in zip(s, t, strict=True))


def ls(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    def z(x: Tensor) -> Tensor:
        return ((x - x.mean()) / (x.std() + 1e-7) / 2).softmax(0)

    return mean(4 * kl(z(b), z(a)) for a, b in zip(s, t, strict=True))


def dkd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    values = []
    for a, b, y in zip((s / 4).softmax(1), (t / 4).softmax(1), labels.tolist(), strict=True):
        rest = [c for c in range(len(a)) if c != y]
        binary = kl(torch.stack([b[y], 1 - b[y]]), torch.stack([a[y], 1 - a[y]]))
        values.append(16 * (binary + 8 * kl(b[rest] / b[rest].sum(), a[rest] / a[rest].sum())))
    return mean(values)


def dist(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    def apart(a: Tensor, b: Tensor) -> Tensor:
        a, b = a - a.mean(), b - b.mean()
        return 1 - (a * b).sum() / (a.norm() * b.norm() + 1e-8)

    q, p = s.softmax(1), t.softmax(1)
    rows, columns = zip(q, p, strict=True), zip(q.T, p.T, strict=True)
    return mean(apart(a, b) for a, b in rows) + mean(apart(a, b) for a, b in columns)


def fitnet(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return ((s - t) ** 2).mean()


def at(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    both = zip(*smaller(s, t), strict=True)
    maps = [[unit((x * x).mean(0).flatten()) for x in pair] for pair in both]
    return mean(((a - b) ** 2).mean() for a, b in maps)


def nst(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    def kernel(x: Tensor, y: Tensor) -> Tensor:
        x, y = F.normalize(x.flatten(1)), F.normalize(y.flatten(1))
        return ((x[:, None] * y[None, :]).sum(2) ** 2).mean()

    both = zip(*smaller(s, t), strict=True)
    return mean(kernel(b, b) + kernel(a, a) - 2 * kernel(a, b) for a, b in both)


def sp(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    grams = [torch.stack([unit(torch.stack([(a * b).sum() for b in x])) for a in x]) for x in (s, t)]
    return ((grams[0] - grams[1]) ** 2).sum() / len(s) ** 2


def rkd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    n, distances, angles = len(s), [], []
    if n < 2:
        return s.sum() * 0
    for x in (s, t):
        length = [[(a - b).norm() if i != j else a.new_zeros(()) for j, b in enumerate(x)] for i, a in enumerate(x)]
        whole = torch.stack([torch.stack(row) for row in length])
        distances.append(whole / (whole.sum() / (n * n - n)))
        ways = [[(b - a) / (b - a).norm() if i != j else a * 0 for j, b in enumerate(x)] for i, a in enumerate(x)]
        angles.append(torch.stack([(u * v).sum() for row in ways for u in row for v in row]))
    return 25 * F.smooth_l1_loss(*distances) + 50 * F.smooth_l1_loss(*angles)


def pkt(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    both = []
    for x in (s, t):
        x = [a / (a.norm() + 1e-7) for a in x]
        near = torch.stack([torch.stack([((a * b).sum() + 1) / 2 for b in x]) for a in x])
        both.append(near / near.sum(1, keepdim=True))
    return (both[1] * ((both[1] + 1e-7) / (both[0] + 1e-7)).log()).mean()


def cc(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    delta = [(a - b).abs() for a, b in zip(s, t, strict=True)]
    return mean((a * b).sum() for a, b in itertools.pairwise(delta)) if len(s) > 1 else s.sum() * 0


def vid(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    s, t = smaller(s, t)
    m = d.gaussians[k].mean(s)
    v = (1 + d.gaussians[k].log_scale.exp()).log() + 1e-5
    return mean(((m[:, c] - t[:, c]) ** 2 / v[c] + v[c].log()).mean() / 2 for c in range(t.shape[1]))


def ft(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    both = zip(*smaller(s, t), strict=True)
    maps = [[unit((x * x).mean(0).flatten()) for x in pair] for pair in both]
    return mean((a - b).abs().mean() for a, b in maps)


def reviewed(d: Any, pairs: list[Pair]) -> list[Pair]:
    """From the deepest: take in, weigh against what came down, resize, give out."""
    found, down = [], None
    for fusion, (s, t) in reversed(list(zip(d.fusions, pairs, strict=True))):
        s, t = (x.reshape(*x.shape, 1, 1) if x.dim() == 2 else x for x in (s, t))
        x = fusion.enter(s)
        if down is not None:
            down = F.interpolate(down, x.shape[-1])
            a, b = fusion.attend(torch.cat([x, down], 1)).split(1, 1)
            x = a * x + b * down
        down = F.interpolate(x, t.shape[-1])
        found.append((fusion.leave(down), t))
    return found[::-1]


def reviewkd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    sizes = [s.shape[-1]] + [size for size in (4, 2, 1) if size < s.shape[-1]]
    terms = [((F.adaptive_avg_pool2d(s, size) - F.adaptive_avg_pool2d(t, size)) ** 2).mean() for size in sizes]
    return sum(term / 2**i for i, term in enumerate(terms)) / sum(1 / 2**i for i in range(len(sizes)))


def ofd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    m = d.get_buffer(f"margin{k}")[:, None, None]
    s, t = smaller(s, t)
    low = torch.where(s > m, (s - m) ** 2, 0)
    middle = torch.where(s > t, (s - t) ** 2, 0)
    distance = torch.where(t > 0, (s - t) ** 2, torch.where(t > m, middle, low))
    return distance.sum() / len(s) / 2 ** (len(d.spots) - 1 - k)


def changes(d: Any, pairs: list[Pair]) -> list[Pair]:
    """Per spot from the second on, and per sample, the tables of student and teacher; nothing at the first."""
    main = []
    for s, t in pairs:
        both = []
        for a, b in zip(s, t, strict=True):
            ours, theirs = (x.flatten(1) @ x.flatten(1).T for x in (a, b))
            values, vectors = torch.linalg.eigh(theirs.detach())
            assert values[-1] > values[-2]
            v = vectors[:, -1] * vectors[vectors[:, -1].abs().argmax(), -1].sign()
            w = max(torch.linalg.eigh(ours.detach()).eigenvectors.T[-4:], key=lambda u: abs(u @ v))
            value = w @ ours.detach() @ w
            # One step of Newton's method from the exact vector stays there, and has the vector's gradient.
            inverse = torch.linalg.pinv(value * torch.eye(len(w)) - ours.detach(), rtol=1e-10)
            u = w + inverse @ (ours @ w - value * w)
            both.append((u * (u @ v).detach().sign(), v))
        main.append(both)
    found = [tuple(x.flatten(1) * 0 for x in pairs[0])]
    for before, after in itertools.pairwise(main):
        rows = [
            [(-((x[:, None] - y[None, :]) ** 2) / 8).exp() for x, y in zip(p, q, strict=True)]
            for p, q in zip(before, after, strict=True)
        ]
        found.append(tuple(torch.stack(side) for side in zip(*rows, strict=True)))
    return found


def kdsvd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return ((s - t) ** 2).sum() / len(s)


def this_and_before(rows: Tensor) -> Tensor:
    return rows & rows.roll(1, dims=0)


def crd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    rows, total = d.draw(index, labels), s.new_zeros(())
    for x, embed, bank in ((s, d.embed_s, d.bank_t), (t, d.embed_t, d.bank_s)):
        scores = [
            [((bank[j] * unit(e)).sum() / 0.07).exp() for j in row] for e, row in zip(embed(x), rows, strict=True)
        ]
        z = torch.stack([torch.stack(row) for row in scores]).mean().detach() * len(bank)
        c = (rows.shape[1] - 1) / len(d.bank_s)
        for own, *others in scores:
            total = total - (own / z / (own / z + c + 1e-7)).log()
            total = total - sum((c / (other / z + c + 1e-7)).log() for other in others)
    return total / len(s)


def simkd(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    return mean(((a - b) ** 2).mean() for a, b in zip(*smaller(s, t), strict=True))


def dfa(d: Any, k: int, s: Tensor, t: Tensor, labels: Tensor, index: Tensor) -> Tensor:
    losses = []
    for a, blocks in zip(s, t, strict=True):
        mixed = sum(w * b / (b**2).mean().sqrt() for w, b in zip(d.alpha(k), blocks, strict=True))
        losses.append(((a - mixed) ** 2).mean())
    return mean(losses)


PLAIN = {
    "kd": Plain(kd),
    "ab": Plain(kd),  # its own loss is all in the warm-up
    "fsp": Plain(kd),
    "dkd": Plain(dkd),
    "dist": Plain(dist),
    "ls": Plain(ls),
    "fitnet": Plain(fitnet, lambda d, pairs: [(r(s), t) for r, (s, t) in zip(d.regressors, pairs, strict=True)]),
    "at": Plain(at),
    "nst": Plain(nst),
    "sp": Plain(sp),
    "rkd": Plain(rkd),
    "pkt": Plain(pkt),
    "cc": Plain(cc, lambda d, pairs: [(d.students[0](s), d.teachers[0](t)) for s, t in pairs]),
    "vid": Plain(vid),
    "crd": Plain(crd),
    "reviewkd": Plain(reviewkd, reviewed),
    "ofd": Plain(ofd, lambda d, pairs: [(c(s), t) for c, (s, t) in zip(d.connectors, pairs, strict=True)]),
    "dfa": Plain(dfa, lambda d, pairs: [(m.connector(s), t) for m, (s, t) in zip(d.matches, pairs, strict=True)]),
    "kdsvd": Plain(kdsvd, changes, this_and_before),
    "simkd": Plain(simkd),  # its projector is in the network
    "ft": Plain(ft, lambda d, pairs: [(d.translate(s), d.warmup.encode(t)) for s, t in pairs]),
}
