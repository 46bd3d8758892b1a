"""Losses between samples: how those of a batch lie to each other in both networks, and those of a memory."""

import math
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch
from sakd_cli.config.methods import CCConfig, CRDConfig, RKDConfig
from sakd_cli.distillers.distiller import Distiller, SpotwiseDistiller, weighted_mean
from sakd_cli.errors import MemoryLimitError, UsageError
from sakd_cli.models.adapters import LinearAdapter
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features


def similarities(x: Tensor, weight: Tensor) -> Tensor:
    """Row-normalised Gram matrix of the batch, [N, N]; columns of samples with weight 0 are 0."""
    flat = x.flatten(1)
    return F.normalize((flat @ flat.T) * weight[None, :], dim=1)


@final
class SP(SpotwiseDistiller):
    """Samples that are alike for the teacher become alike for the student.

    loss = |G(s) - G(t)|_F^2 / n^2,  G(f) = f f^T with each row scaled to length 1

    Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, equation 4. With a selection of n of N
    samples the matrices have those rows and columns only, and the loss is multiplied by n/N: divided by n N.
    """

    scope = "batch"

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        difference = similarities(student, weight) - similarities(teacher, weight)
        terms = difference.square() * weight[:, None] * weight[None, :]
        return terms.sum() / (weight.sum().clamp(min=FLOOR) * len(weight))


FLOOR = 1e-12  # of squared distances and of lengths, as published; of sums of weights


def distances(x: Tensor, pair: Tensor) -> Tensor:
    """Euclidean distances between all samples over their mean: [N, D] to [N, N].

    pair [N, N] weighs what the mean is taken over; the diagonal of `pair` is 0, and what lies outside is not used.
    """
    square = x.square().sum(dim=1)
    squared = (square[:, None] + square[None, :] - 2 * x @ x.T).clamp(min=FLOOR)
    found = squared.sqrt()
    total, count = (found * pair).sum(), pair.sum()
    mean = torch.where(count > 0, total / count.clamp(min=FLOOR), torch.ones_like(total))
    return found / mean


def angles(x: Tensor) -> Tensor:
    """Cosine of the angle at sample i between the ways to j and to k: [N, D] to [N, N, N]."""
    ways = x[None, :, :] - x[:, None, :]
    length = torch.linalg.vector_norm(ways, dim=2, keepdim=True)
    # Two equal samples have no way between them: 0, with a gradient that stays finite.
    units = ways / torch.where(length > FLOOR, length, torch.ones_like(length))
    return torch.bmm(units, units.transpose(1, 2))


@final
class RKD(SpotwiseDistiller):
    """Distances and angles between the samples of a batch are the same for student and teacher.

    loss = a mean_ij h(d_ij(s), d_ij(t)) + b mean_ijk h(cos_ijk(s), cos_ijk(t)),  h = smooth L1 (Huber, delta 1)
    d = Euclidean distance over its mean in the batch;  cos_ijk = angle at i between j and k;  a = 25, b = 50

    Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019, equations 5, 6 and 8 to 10. The means run over
    all n^2 and n^3 entries, degenerate ones included. With n of N samples chosen, pairs and triples of chosen ones
    count, and the loss is multiplied by n/N; below two it is 0 (the published code gives NaN).
    """

    scope = "batch"
    config: RKDConfig

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        s, t = student.flatten(1), teacher.flatten(1)
        chosen, size = weight.sum().clamp(min=FLOOR), len(weight)
        both = weight[:, None] * weight[None, :]
        pair = both * (1 - torch.eye(size, dtype=weight.dtype, device=weight.device))
        apart = F.smooth_l1_loss(distances(s, pair), distances(t, pair), reduction="none") * pair
        turned = F.smooth_l1_loss(angles(s), angles(t), reduction="none") * (both[:, :, None] * weight)
        loss = self.config.distance * apart.sum() / (chosen * size)
        return loss + self.config.angle * turned.sum() / (chosen.square() * size)


EPSILON = 1e-7  # beside lengths and probabilities, as published


def neighbours(x: Tensor, weight: Tensor) -> Tensor:
    """Probability of each sample to be a neighbour of another: [N, D] to [N, N], rows sum to 1.

    Columns of samples with weight 0 are 0.
    """
    unit = x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + EPSILON)
    near = (unit @ unit.T + 1) / 2 * weight[None, :]
    total = near.sum(dim=1, keepdim=True)
    return near / torch.where(total > 0, total, torch.ones_like(total))


@final
class PKT(SpotwiseDistiller):
    """The probabilities that samples of a batch are neighbours are the same for student and teacher.

    loss = mean_ij p_ij(t) ln((p_ij(t) + e) / (p_ij(s) + e)),  p_ij = (cos_ij + 1) / sum_j (cos_ij + 1),  e = 1e-7

    Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018, equations 4 to
    6 with the cosine kernel. The mean runs over all n^2 pairs. With a selection of n of N samples only chosen columns
    and rows count, and the loss is multiplied by n/N: divided by n N.
    """

    scope = "batch"

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        p_s, p_t = (neighbours(x.flatten(1), weight) for x in (student, teacher))
        terms = p_t * ((p_t + EPSILON) / (p_s + EPSILON)).log()
        terms = terms * weight[:, None] * weight[None, :]
        return terms.sum() / (weight.sum().clamp(min=FLOOR) * len(weight))


def neighbouring_products(delta: Tensor, weight: Tensor) -> Tensor:
    """Mean inner product of each chosen sample with the next chosen one, times n/N; 0 below two. [N, D], [N] to []."""
    # A stable sort brings the chosen ones together and keeps their order in the batch.
    order = torch.argsort((weight > 0).to(torch.uint8), descending=True, stable=True)
    delta, weight = delta.index_select(0, order), weight.index_select(0, order)
    pair = weight[:-1] * weight[1:]
    products = (delta[:-1] * delta[1:]).sum(dim=1) * pair
    return products.sum() / pair.sum().clamp(min=FLOOR) * weight.sum() / len(weight)


@final
class CC(SpotwiseDistiller):
    """The differences between student and teacher at neighbouring samples of a batch are not alike.

    loss = mean over i < n of sum_d D_id D_(i+1)d,  D = |e_s - e_t|,  e = linear embeddings to 128 numbers

    Peng et al., "Correlation Congruence for Knowledge Distillation", ICCV 2019, in the form of the CRD benchmark (Tian
    et al., ICLR 2020), which the published spot-adaptive runs use; the paper's kernel is not in it. It depends on the
    order of the batch. Both embeddings see the whole batch and both are trained, as in the benchmark (the published
    spot-adaptive step leaves the teacher's at its initial weights; the student's gradient is the same).
    """

    scope = "batch"

    def __init__(self, spots: tuple[Spot, ...], config: CCConfig) -> None:
        super().__init__(spots)
        width = (config.width,)
        self.students = nn.ModuleList([LinearAdapter(spot.student_shape, width) for spot in spots])
        self.teachers = nn.ModuleList([LinearAdapter(spot.teacher_shape, width) for spot in spots])

    def spot_loss(self, k: int, student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
        return neighbouring_products((self.students[k](student) - self.teachers[k](teacher)).abs(), weight)


MASK32 = 0xFFFFFFFF


def scramble(x: Tensor) -> Tensor:
    """A fixed scrambling of 32-bit numbers in int64: multiply and xor-shift, the same on every device.

    One-to-one. Factors below 2^31 keep every product below 2^63.
    """
    x = x & MASK32
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & MASK32
    x = ((x ^ (x >> 15)) * 0x735A2D97) & MASK32
    return x ^ (x >> 15)


def memory_need(samples: int, batch: int, width: int, negatives: int) -> int:
    """Bytes that banks and one training step take, roughly; `samples` of the whole training split."""
    banks = 2 * samples * width * 4
    products = batch * samples * 4  # with a whole bank: first the scores, then their gradients, one side at a time
    chosen = batch * (negatives + 1) * (4 * 8 + 5 * 4)  # row numbers; intermediate results of one side
    return banks + products + chosen


@final
class CRD(Distiller):
    """A sample's embedding by one network is contrasted with other classes' embeddings by the other network.

    loss = -mean_i (ln P_i0 / (P_i0 + c + e) + sum_j ln c / (P_ij + c + e)), once per network as the anchor
    P_ij = exp(<e_i, m_j> / T) / Z;  m_0 = the sample's own row in the other network's bank, m_j = `negatives` rows of
    other classes;  c = negatives / rows, e = 1e-7, T = 0.07;  Z = mean of exp(...) at the first call times rows

    Tian, Krishnan, Isola, "Contrastive Representation Distillation", ICLR 2020, equations 10, 17 and 19. Embeddings:
    one linear layer to 128 numbers, scaled to length 1, both trained. Afterwards the chosen samples' rows move half way
    to their new embedding. Vectors [N, D]. The same numbers with less work: one product with the whole bank, of
    which the drawn entries are gathered, and a gradient that is known with the value. Where fewer rows than `negatives`
    are of other classes, as many are drawn as every class can have.

    Negatives are drawn on the device. A call shuffles all rows; a sample walks through them from a place and with a
    stride of its own and takes the first rows of other classes: none twice, every set equally likely, at a tenth of the
    cost of a shuffle per sample. Seed and call number are buffers: a resumed run draws what it would have drawn.
    """

    scope = "memory"

    def __init__(self, spots: tuple[Spot, ...], config: CRDConfig, labels: Tensor, batch_size: int = 64) -> None:
        """labels  class of every sample of the training split, in the order of `Batch.index`."""
        super().__init__(spots)
        rows, width = len(labels), config.width
        others = rows - int(labels.bincount().max()) if rows else 0
        if others < 1:
            raise UsageError("method crd: the training split has one class only, hence no negatives")
        self.negatives = min(config.negatives, others)
        self.steps = self.negatives + rows - others  # of a walk that meets all of the sample's own class
        need, limit = memory_need(rows, batch_size, width, self.negatives), config.memory_limit * 2**30
        if need > limit:
            each = need - memory_need(rows, batch_size - 1, width, self.negatives)
            fits = int((limit - memory_need(rows, 0, width, self.negatives)) // each)
            smaller = f"--batch-size {fits} fits, or" if fits > 0 else "the banks alone are too large:"
            raise MemoryLimitError(
                f"method crd: banks and negatives of {rows} images need {need / 2**30:.1f} GiB, "
                f"above method.memory_limit ({config.memory_limit:g} GiB)",
                hint=f"{smaller} --set method.memory_limit=GIB, method.width=... or method.negatives=...",
            )
        self.temperature, self.momentum = config.contrast_temperature, config.momentum
        (spot,) = spots
        self.embed_s = LinearAdapter(spot.student_shape, (width,))
        self.embed_t = LinearAdapter(spot.teacher_shape, (width,))
        bound = 1 / math.sqrt(width / 3)
        self.classes = nn.Buffer(labels.clone(), persistent=False)  # the data set's, not the run's
        strides = [stride for stride in range(1, rows) if math.gcd(stride, rows) == 1]
        self.strides = nn.Buffer(torch.tensor(strides), persistent=False)  # those that meet every row once
        self.seed = nn.Buffer(torch.randint(2**31, ()))
        self.calls = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self.bank_s = nn.Buffer(torch.empty(rows, width).uniform_(-bound, bound))
        self.bank_t = nn.Buffer(torch.empty(rows, width).uniform_(-bound, bound))
        self.z_s = nn.Buffer(torch.tensor(-1.0))  # below 0: not set yet
        self.z_t = nn.Buffer(torch.tensor(-1.0))

    def forward(self, student: Features, teacher: Features, weight: Tensor, batch: Batch) -> Tensor:
        ((s, t),) = self.pairs(student, teacher)
        rows = self.draw(batch.index, batch.labels)
        self.calls.add_(1)
        return self.contrast(s, t, weight[0], rows)[None]

    def draw(self, index: Tensor, labels: Tensor) -> Tensor:
        """Rows of the banks for each sample: its own first, then its negatives. [N] each to [N, 1 + negatives]."""
        size, key = len(self.classes), scramble(self.seed + scramble(self.calls))
        shuffled = scramble(torch.arange(size, device=index.device) ^ key).argsort()
        of_sample = scramble(index ^ scramble(key + 1))
        start, stride = scramble(of_sample + 1), self.strides[of_sample % len(self.strides)]
        places = (start[:, None] + stride[:, None] * torch.arange(self.steps, device=index.device)) % size
        met = shuffled[places]
        other = self.classes[met] != labels[:, None]
        # The k-th row of another class goes to column k; what is not wanted goes to one column more, which is cut off.
        column = torch.where(other, other.cumsum(dim=1), self.negatives + 1).clamp(max=self.negatives + 1)
        rows = torch.empty(len(index), self.negatives + 2, dtype=torch.int64, device=index.device)
        rows[:, 0] = index
        return rows.scatter(1, column, met)[:, :-1]

    def contrast(self, s: Tensor, t: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
        """The loss of vectors [N, D] against these rows [N, 1 + negatives]; then Z and the banks go forward."""
        e_s = F.normalize(self.embed_s(s), dim=1).to(self.bank_s.dtype)
        e_t = F.normalize(self.embed_t(t), dim=1).to(self.bank_t.dtype)
        of_s, by_s = self._side(e_s, self.bank_t, self.z_s, weight, rows)
        of_t, by_t = self._side(e_t, self.bank_s, self.z_t, weight, rows)
        # Values that have their gradient with them: what is added is 0.
        slopes = ((e_s - e_s.detach()) * by_s).sum() + ((e_t - e_t.detach()) * by_t).sum()
        loss = of_s + of_t + slopes
        with torch.no_grad():
            self._remember(self.bank_s, e_s, weight, rows[:, 0])
            self._remember(self.bank_t, e_t, weight, rows[:, 0])
        return loss

    @torch.no_grad()
    def _side(self, anchor: Tensor, bank: Tensor, z: Tensor, weight: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of one network's embeddings against the other's bank, and its gradient by the embeddings, [N, width].

        The gradient is written out, d loss / d ln P = w / N (P / (P + c + e) - [own row]): so nothing of the bank's
        size is saved for the backward pass, and the bank may change at once.
        """
        scores = (anchor @ bank.T).gather(1, rows).div_(self.temperature).exp_()
        chosen = weight.sum()
        first = (scores.mean(dim=1) * weight).sum() / chosen.clamp(min=EPSILON) * len(bank)
        z.copy_(torch.where((z < 0) & (chosen > 0), first, z))
        p = scores / torch.where(z > 0, z, torch.ones_like(z))
        c = self.negatives / len(bank)
        total = p + (c + EPSILON)
        own, others = (p[:, 0] / total[:, 0]).log(), (c / total[:, 1:]).log().sum(dim=1)
        slope = p / total
        slope[:, 0] -= 1
        slope *= weight[:, None] / (len(weight) * self.temperature)
        spread = torch.zeros(len(rows), len(bank), dtype=slope.dtype, device=slope.device).scatter_add_(1, rows, slope)
        return weighted_mean(-(own + others), weight), spread @ bank

    def _remember(self, bank: Tensor, embedded: Tensor, weight: Tensor, index: Tensor) -> None:
        old = bank.index_select(0, index)
        new = F.normalize(self.momentum * old + (1 - self.momentum) * embedded, dim=1)
        bank.index_copy_(0, index, torch.where(weight[:, None] > 0, new, old))
