"""The published training step, plain and slow: the baseline of the fast one (guide `methods`).

Rows are chosen by index, both networks run twice from the image, two optimizers and zero-filled gradients, as when
the method was published. Only network and adapter modules are shared with the step that is measured.
"""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.distillers.logits import KD
from sakd_cli.distillers.maps import AT, FitNet
from sakd_cli.distillers.relations import CRD, SP
from sakd_cli.models.staged import StagedModel
from sakd_cli.routing.table import Adaptive
from sakd_cli.tasks.distill import DistillTask


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    side = min(student.shape[2], teacher.shape[2])
    maps = []
    for feature in (student, teacher):
        energy = (F.adaptive_avg_pool2d(feature, (side, side)) ** 2).mean(1).flatten(1)
        maps.append(energy / energy.norm(dim=1, keepdim=True))
    return ((maps[0] - maps[1]) ** 2).mean()


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    grams = []
    for feature in (student, teacher):
        flat = feature.reshape(feature.shape[0], -1)
        gram = flat @ flat.t()
        grams.append(gram / gram.norm(dim=1, keepdim=True))
    return ((grams[0] - grams[1]) ** 2).sum() / student.shape[0] ** 2


def kl(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    p = F.softmax(teacher / temperature, 1)
    terms = p * (p.log() - F.log_softmax(student / temperature, 1))
    return temperature**2 * terms.sum() / student.shape[0]


class OfRows(nn.Module):
    """A plain loss of the chosen rows; `layer`, if any, is what the student's whole feature passes first."""

    def __init__(self, loss: Callable[[Tensor, Tensor], Tensor], layer: nn.Module | None = None) -> None:
        super().__init__()
        self.loss, self.layer = loss, layer

    def forward(self, s: Tensor, t: Tensor, rows: Tensor, contrast: Tensor | None) -> Tensor:
        """Features [N, ...], rows [N] bool; `contrast` is for CRD alone."""
        return self.loss((s if self.layer is None else self.layer(s))[rows], t[rows])


class PlainCRD(nn.Module):
    """CRD as published: the sampled rows of the banks are gathered for every chosen sample, then multiplied."""

    def __init__(self, ours: CRD) -> None:
        super().__init__()
        self.embed_s, self.embed_t = copy.deepcopy(ours.embed_s), copy.deepcopy(ours.embed_t)
        self.banks = {"s": ours.bank_s.clone(), "t": ours.bank_t.clone()}
        self.z: dict[str, Tensor] = {}
        self.temperature, self.momentum = ours.temperature, ours.momentum

    def forward(self, s: Tensor, t: Tensor, rows: Tensor, contrast: Tensor | None) -> Tensor:
        """Vectors [N, D], rows [N] bool, contrast [N, 1 + negatives]: each sample's own row first."""
        assert contrast is not None
        contrast = contrast[rows]
        embedded = {"s": self.embed_s(s[rows]), "t": self.embed_t(t[rows])}
        embedded = {side: e / e.norm(dim=1, keepdim=True) for side, e in embedded.items()}
        total = s.new_zeros(())
        for side, other in (("s", "t"), ("t", "s")):
            bank, (n, k) = self.banks[other], contrast.shape
            taken = bank.index_select(0, contrast.reshape(-1)).reshape(n, k, -1)
            scores = torch.exp(torch.bmm(taken, embedded[side].unsqueeze(2)).squeeze(2) / self.temperature)
            if side not in self.z:
                self.z[side] = scores.mean().detach() * len(bank)
            p = scores / self.z[side]
            c = (k - 1) / len(bank)
            own = torch.log(p[:, 0] / (p[:, 0] + c + 1e-7))
            others = torch.log(c / (p[:, 1:] + c + 1e-7))
            total = total - (own.sum() + others.sum()) / n
        with torch.no_grad():
            for side, bank in self.banks.items():
                moved = self.momentum * bank[contrast[:, 0]] + (1 - self.momentum) * embedded[side]
                bank[contrast[:, 0]] = moved / moved.norm(dim=1, keepdim=True)
        return total


# How each of our feature distillers was published: from ours and the spot's number to the plain one.
PUBLISHED: dict[type, Callable[[Any, int], nn.Module]] = {
    FitNet: lambda ours, k: OfRows(F.mse_loss, copy.deepcopy(ours.regressors[k])),
    AT: lambda ours, k: OfRows(attention_loss),
    SP: lambda ours, k: OfRows(similarity_loss),
    CRD: lambda ours, k: PlainCRD(ours),
}


class LiteralRouting:
    """The published step of a task with the adaptive router, from copies of all that is trained or remembered.

    `step` does what one published iteration does; the router's learning rate is half of the student's.

    compared  per spot a module that is called with both whole features, the chosen rows and CRD's rows, and gives the
              plain loss of the chosen ones; what it trains belongs to the student's optimizer. None: by `PUBLISHED`
    """

    def __init__(self, task: DistillTask, teacher: StagedModel, compared: list[nn.Module] | None = None) -> None:
        router, graft, logits = task.router, task.graft, task.logit_distiller
        assert graft is not None
        assert isinstance(router, Adaptive)
        assert isinstance(logits, KD)
        self.places = [(spot.student, spot.teacher) for spot in task.spots[:-1]]
        if compared is None:
            features = task.feature_distiller
            compared = [PUBLISHED[type(features)](features, k) for k in range(len(self.places))]
        self.student, self.teacher, self.policy = copy.deepcopy(task.network), teacher, copy.deepcopy(router.policy)
        self.to_teacher, self.to_student = copy.deepcopy(graft.to_teacher), copy.deepcopy(graft.to_student)
        self.compared = nn.ModuleList(compared).train()
        self.factors, self.temperature, self.tau = task.factors, logits.config.temperature, router.tau
        student_side, router_side = (self.student, self.compared), (self.policy, self.to_teacher, self.to_student)
        self.student_parameters = [p for module in student_side for p in module.parameters() if p.requires_grad]
        self.router_parameters = [p for module in router_side for p in module.parameters()]
        rate = task.rates.lr
        self.student_sgd = torch.optim.SGD(self.student_parameters, lr=rate, momentum=0.9, weight_decay=5e-4)
        self.router_sgd = torch.optim.SGD(self.router_parameters, lr=rate / 2, momentum=0.9, weight_decay=1e-3)

    def _zero(self) -> None:
        for parameter in (*self.student_parameters, *self.router_parameters):
            parameter.grad = torch.zeros_like(parameter)

    def _routed(self, x: Tensor, gate: Tensor) -> Tensor:
        end = len(self.student.stages) + 1
        end_t = len(self.teacher.stages) + 1
        u_s, u_t, done_s, done_t = x, x, 0, 0
        for k, (s, t) in enumerate(self.places):
            p = self.student.run(u_s, done_s, s + 1)
            q = self.teacher.run(u_t, done_t, t + 1)
            a = gate[:, k].reshape(-1, *[1] * (p.dim() - 1))
            u_t = (1 - a) * self.to_teacher[k](p) + a * q
            u_s = (1 - a) * p + a * self.to_student[k](q)
            done_s, done_t = s + 1, t + 1
        a = gate[:, -1:]
        return (1 - a) * self.student.run(u_s, done_s, end) + a * self.teacher.run(u_t, done_t, end_t)

    def step(self, x: Tensor, y: Tensor, uniform: Tensor, contrast: Tensor | None = None) -> dict[str, float]:
        """One iteration; images, labels, uniform noise, CRD's rows (drawn beforehand, as published) to the losses."""
        self.teacher.eval()
        self.student.train()
        with torch.no_grad():
            theirs = self.teacher.features(x)
        ours = self.student.features(x)
        (features_t, t), (features_s, s) = (theirs.stages, theirs.logits), (ours.stages, ours.logits)
        pooled = torch.cat([features_t[-1].detach(), features_s[-1].detach()], 1)
        scores = self.policy(pooled).reshape(len(x), -1, 2)
        noise = -torch.log(-torch.log(uniform.reshape_as(scores) + 1e-20) + 1e-20)
        soft = F.softmax((scores + noise) / self.tau, dim=2)
        hard = F.one_hot(soft.argmax(2), 2).to(soft.dtype)
        gate = hard[..., 0] + (soft[..., 0] - soft[..., 0].detach())
        chosen = gate.detach() > 0.5
        n = len(x)
        distilled = x.new_zeros(())
        for k, (i, j) in enumerate(self.places):
            rows = chosen[:, k]
            if rows.any():
                distilled = distilled + rows.sum() / n * self.compared[k](features_s[i], features_t[j], rows, contrast)
        rows = chosen[:, -1]
        softened = rows.sum() / n * kl(s[rows], t[rows], self.temperature) if rows.any() else x.new_zeros(())
        ce = F.cross_entropy(s, y)
        self.student.eval()
        routed = self._routed(x, gate)
        self.student.train()
        routed_ce = F.cross_entropy(routed, y)
        scale = 1.0
        if routed_ce.item() > ce.item():
            scale = self.factors.gamma
        elif routed_ce.item() < ce.item():
            scale = 1 / self.factors.gamma
        router = scale * routed_ce
        missing = n / 2 - gate[:, -1].sum()
        if missing.item() > 0:
            router = router + missing
        total = ce + self.factors.feature * distilled + self.factors.logit * softened
        self._zero()
        router.backward(retain_graph=True)
        self.router_sgd.step()
        self._zero()
        total.backward()
        self.student_sgd.step()
        return {"ce": ce.item(), "loss": total.item(), "router": router.item()}
