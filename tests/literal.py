"""The published training step, plain and slow, as the yardstick of the fast one (sakd spec, section 2.3).

Own code, written from the description in its order: rows are chosen by index, both networks run twice from the image,
two losses are propagated backwards by two optimizers, and every gradient is zero-filled, as it was when the method was
published. Nothing here is shared with `sakd_cli` but the network and adapter modules.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Loss = Callable[[Tensor, Tensor], Tensor]


def mean_square(student: Tensor, teacher: Tensor) -> Tensor:
    return ((student - teacher) ** 2).mean()


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


class LiteralRouting:
    """One pair, one method; `step` does what one published iteration does.

    places      [(student stage, teacher stage)] of the feature spots
    losses      the plain loss of each spot, called with the chosen rows
    regressors  a module per spot that the student's whole feature passes first (FitNet), or None
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        policy: nn.Linear,
        lifts: list[nn.Module],
        drops: list[nn.Module],
        places: list[tuple[int, int]],
        losses: list[Loss],
        regressors: list[nn.Module | None],
        *,
        alpha: float,
        beta: float,
        gamma: float,
        temperature: float,
        tau: float,
        lr: float,
    ) -> None:
        self.student, self.teacher, self.policy, self.lifts, self.drops = student, teacher, policy, lifts, drops
        self.places, self.losses, self.regressors = places, losses, regressors
        self.alpha, self.beta, self.gamma, self.temperature, self.tau = alpha, beta, gamma, temperature, tau
        student_side = [student, *(module for module in regressors if module is not None)]
        self.student_parameters = [p for module in student_side for p in module.parameters()]
        self.router_parameters = [p for module in (policy, *lifts, *drops) for p in module.parameters()]
        self.student_sgd = torch.optim.SGD(self.student_parameters, lr=lr, momentum=0.9, weight_decay=5e-4)
        self.router_sgd = torch.optim.SGD(self.router_parameters, lr=lr / 2, momentum=0.9, weight_decay=1e-3)

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
            u_t = (1 - a) * self.lifts[k](p) + a * q
            u_s = (1 - a) * p + a * self.drops[k](q)
            done_s, done_t = s + 1, t + 1
        a = gate[:, -1:]
        return (1 - a) * self.student.run(u_s, done_s, end) + a * self.teacher.run(u_t, done_t, end_t)

    def step(self, x: Tensor, y: Tensor, uniform: Tensor) -> dict[str, float]:
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
            feature = features_s[i]
            if self.regressors[k] is not None:
                feature = self.regressors[k](feature)
            if rows.any():
                distilled = distilled + rows.sum() / n * self.losses[k](feature[rows], features_t[j][rows])
        rows = chosen[:, -1]
        softened = rows.sum() / n * kl(s[rows], t[rows], self.temperature) if rows.any() else x.new_zeros(())
        ce = F.cross_entropy(s, y)
        self.student.eval()
        routed = self._routed(x, gate)
        self.student.train()
        routed_ce = F.cross_entropy(routed, y)
        scale = 1.0
        if routed_ce.item() > ce.item():
            scale = self.gamma
        elif routed_ce.item() < ce.item():
            scale = 1 / self.gamma
        router = scale * routed_ce
        missing = n / 2 - gate[:, -1].sum()
        if missing.item() > 0:
            router = router + missing
        total = ce + self.beta * distilled + self.alpha * softened
        self._zero()
        router.backward(retain_graph=True)
        self.router_sgd.step()
        self._zero()
        total.backward()
        self.student_sgd.step()
        return {"ce": ce.item(), "loss": total.item(), "router": router.item()}
