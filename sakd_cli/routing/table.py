"""The routing policies (with Gumbel-Softmax), and the only place where a router's name meets one of them.

To add a policy: its class and its row of `ROUTERS` here, and a config class in `config/routers.py`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli import distributed
from sakd_cli.batch import Batch
from sakd_cli.config import code, plugins
from sakd_cli.config.routers import LearnedConfig, RouterConfig
from sakd_cli.errors import UsageError
from sakd_cli.routing.router import Answers, Decision, Router


class AnswerRouter(Router, ABC):
    """Weighs the samples by the logits of both networks and the labels."""

    needs_answers = True

    def __init__(self, spots: int, cap: float = 1.0) -> None:
        super().__init__()
        self.spots, self.cap = spots, cap

    @abstractmethod
    def weigh(self, answers: Answers) -> Tensor:
        """A weight in [0, 1] for every sample, [N], without gradient."""

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor, answers: Answers | None = None) -> Decision:
        assert answers is not None
        return Decision(self.weigh(answers).to(student.dtype).expand(self.spots, -1))


def of_mean(value: Tensor, cap: float, batch: Batch | None) -> Tensor:
    """value [N] over its mean, clipped at `cap`, over which it is then in [0, 1]; `dose=selected-mean` makes it 1.

    The mean is that of the whole batch, of which `batch` is this process's part.
    """
    mean = value.mean() if batch is None else distributed.all_reduce_mean(value.mean(), batch)
    return (value / mean.clamp(min=1e-12)).clamp(max=cap) / cap


@final
class TeacherCorrect(AnswerRouter):
    """1 where the teacher's answer is the label, else 0: the other samples learn from their labels alone.

    Meng, Li, Zhao, Gong, "Conditional Teacher-Student Learning", ICASSP 2019. There the other samples' cross-entropy
    stands in for the softened loss; here it has its weight for all samples, as under every router.
    """

    unmixed = "asks whether the teacher's answer is the label"

    def weigh(self, answers: Answers) -> Tensor:
        return answers.teacher.argmax(dim=1) == answers.labels


@final
class Confidence(AnswerRouter):
    """w_i proportional to the teacher's largest probability, mean 1 over the batch, at most `cap`.

    w_i = min(cap, c_i / mean c) up to that mean,  c_i = max_c softmax(t_i)_c. This project's form of a common idea.
    """

    def weigh(self, answers: Answers) -> Tensor:
        return of_mean(answers.teacher.softmax(dim=1).amax(dim=1), self.cap, answers.batch)


@final
class Entropy(AnswerRouter):
    """w_i proportional to the certainty of the teacher, mean 1 over the batch, at most `cap`.

    w_i = min(cap, e_i / mean e) up to that mean,  e_i = 1 - H(softmax(t_i)) / ln C. After Kwon, Na, Lee, Nam,
    "Adaptive Knowledge Distillation Based on Entropy", ICASSP 2020, who weigh teachers of a sample so, not samples.
    """

    def weigh(self, answers: Answers) -> Tensor:
        log_p = answers.teacher.log_softmax(dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        certainty = (1 - entropy / math.log(answers.teacher.shape[1])).clamp(min=0)
        return of_mean(certainty, self.cap, answers.batch)


@final
class WSLD(AnswerRouter):
    """w_i = 1 - exp(-CE(s_i, y_i) / CE(t_i, y_i)): less where the student is already as good as the teacher.

    Zhou, Song, Chen, Zhou, Wang, Yuan, Zhang, "Rethinking Soft Labels for Knowledge Distillation: A Bias-Variance
    Tradeoff Perspective", ICLR 2021, for the softened logits; here at every spot.
    """

    unmixed = "compares both networks on the one label"

    def weigh(self, answers: Answers) -> Tensor:
        student = F.cross_entropy(answers.student, answers.labels, reduction="none")
        teacher = F.cross_entropy(answers.teacher, answers.labels, reduction="none")
        return 1 - (-student / teacher.clamp(min=1e-12)).exp()


EPSILON = 1e-20  # keeps both logarithms finite for u = 0 and u = 1


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise from numbers uniform in [0, 1), same shape."""
    return -torch.log(-torch.log(uniform + EPSILON) + EPSILON)


def straight_through(scores: Tensor, uniform: Tensor, tau: float) -> Tensor:
    """Draw teacher (1) or student (0): scores and noise [N, S, 2], teacher's score first, to gates [N, S].

    Forward 0 or 1, and 1 with probability sigmoid(teacher - student); backward the gradient of softmax((scores +
    noise) / tau) (Jang et al., ICLR 2017). Exact, where the published (hard - y) + y may be off by one rounding unit.
    """
    noisy = scores + gumbel(uniform)
    soft = torch.softmax(noisy / tau, dim=-1)[..., 0]
    hard = (noisy[..., 0] >= noisy[..., 1]).to(soft.dtype)  # a tie goes to the teacher, as argmax would have it
    return hard + (soft - soft.detach())


class PolicyRouter(Router, ABC):
    """Scores of teacher and student for every spot, from both pooled vectors by one linear layer, score by score.

    teacher_bias  is added once to every teacher's score
    """

    def __init__(self, spots: int, teacher: int, student: int, *, tau: float, teacher_bias: float) -> None:
        super().__init__()
        self.tau, self.noise_width = tau, 0 if self.soft else 2 * spots
        self.policy = nn.Linear(teacher + student, 2 * spots)
        with torch.no_grad():
            self.policy.bias[0::2] += teacher_bias

    def scores(self, teacher: Tensor, student: Tensor) -> Tensor:
        """[N, S, 2], the teacher's first."""
        scores: Tensor = self.policy(torch.cat([teacher, student], dim=1))
        return scores.unflatten(1, (-1, 2))


@final
class Adaptive(PolicyRouter):
    """One linear layer on both pooled vectors scores teacher against student at every spot, and one is drawn.

    scores = W [teacher; student] + b, reshaped to [N, S, 2] with the teacher's score first
    P(teacher) = sigmoid(teacher score - student score)

    Song et al., "Spot-adaptive Knowledge Distillation", IEEE TIP 2022. `teacher_bias` is added once to every teacher's
    score (10 for two networks of one family: such a run starts by distilling everywhere and relaxes).
    """

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        scores = self.scores(teacher, student)
        uniform = noise[:, : self.noise_width].unflatten(1, (-1, 2))
        gate = straight_through(scores, uniform, self.tau)
        probability = torch.sigmoid(scores[..., 0] - scores[..., 1]).detach()
        return Decision(gate.detach().T, gate, probability.T)


@final
class Soft(PolicyRouter):
    """The adaptive router's policy without a draw: gates and weights are the probabilities themselves.

    gate = sigmoid((teacher score - student score) / tau), with its exact gradient. This project's control for the draw
    of Song et al. (IEEE TIP 2022): no noise, no straight-through estimate; a sample's path is a mixture.
    """

    soft = True

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        scores = self.scores(teacher, student)
        gate = torch.sigmoid((scores[..., 0] - scores[..., 1]) / self.tau)
        weight = gate.detach().T
        return Decision(weight, gate, weight)


@final
class Meta(Router):
    """A policy that learns from held-out images where distilling helps, one small step ahead.

    p_ik = sigmoid(W [teacher; student]_i + b)_k is the weight of sample i at spot k, or one number for each class
    L_router = - sum_k mean_i p_ik a_ik / rms_i(a_ik),   a_ik = <d l_ik / d theta, d CE_held_out / d theta>

    theta: the student's weights; l_ik: the distillation loss of sample i at spot k. A gradient step of length eta by
    sum_ik p_ik l_ik changes the held-out cross-entropy by -eta sum_ik p_ik a_ik, to first order. After Ren et al.,
    "Learning to Reweight Examples for Robust Deep Learning", ICML 2018: there max(0, a_i) of the batch at hand are its
    weights, one for all of a sample's loss; here a policy averages over batches, and each spot has weights of its own.
    """

    soft = meta = True

    def __init__(self, spots: int, teacher: int, student: int, classes: int | None) -> None:
        """classes: None where it sees features, else it has one number for each of them and spot."""
        super().__init__()
        self.classes, self.needs_answers = classes, classes is not None
        self.policy = nn.Linear(classes or teacher + student, spots)
        nn.init.zeros_(self.policy.weight)  # 1/2 for every sample at first
        nn.init.zeros_(self.policy.bias)

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor, answers: Answers | None = None) -> Decision:
        if answers is None or self.classes is None:
            seen = torch.cat([teacher, student], dim=1)
        else:
            seen = F.one_hot(answers.labels, self.classes).to(student.dtype)
        gate = torch.sigmoid(self.policy(seen))
        return Decision(gate.detach().T, gate, gate.detach().T)


@final
class Agreement(Router):
    """Distils a sample at a spot where that does not work against its label.

    1 where <g_task, g_hint> >= 0, the two gradients of sample i at the student's feature there; else its hint is left
    out of what the student gets. It is decided in the backward pass, where both are known (`Doses`); adapters on the
    student's side learn from all samples. After Du et al., "Adapting Auxiliary Losses Using Gradient Similarity", arXiv
    1812.02224, who compare the gradients of whole batches by the parameters.
    """

    agreement = True

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        return Decision(student.new_ones((self.spots, len(student))))


@final
class Anti(Router):
    """Routes like the router it wraps and distils exactly where that one would not."""

    def __init__(self, inner: Router) -> None:
        super().__init__()
        self.noise_width = inner.noise_width
        self.inner = inner

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        decision = self.inner(teacher, student, noise)
        return decision._replace(weight=1.0 - decision.weight)


@final
class Fixed(Router):
    """The same weight for every sample: 1 is ordinary distillation, 0 plain training.

    weights  [epochs, S] of every spot; after the last row, the last row. A spot of weight 0 rests: its loss is not
             computed, and what only that loss trains is left as it is
    """

    now: Tensor

    def __init__(self, weights: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.weights = weights
        self.rests = not all(weight for row in weights for weight in row)
        self.register_buffer("now", torch.empty(len(weights[0])), persistent=False)  # set in every epoch
        self.begin_epoch(1)

    def begin_epoch(self, epoch: int) -> None:
        row = self.weights[min(epoch, len(self.weights)) - 1]
        self.now.copy_(torch.tensor(row))
        self.active = tuple(weight > 0 for weight in row)

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        return Decision(self.now.to(student.dtype)[:, None].expand(-1, len(student)))


@final
class Random(Router):
    """An independent draw per sample and spot, with a rate per epoch and spot; after the last row, the last row.

    rates  [epochs, S] chance of distilling. The published control reuses the last feature spot's draw for the logits
           and scales the cross-entropy by gamma; ours does neither (guide `methods`, deviations).
    """

    def __init__(self, rates: Tensor) -> None:
        super().__init__()
        self.noise_width = rates.shape[1]
        self.rates = nn.Buffer(rates)
        self.now = nn.Buffer(rates[0].clone())

    def begin_epoch(self, epoch: int) -> None:
        self.now.copy_(self.rates[min(epoch, len(self.rates)) - 1])

    def forward(self, teacher: Tensor, student: Tensor, noise: Tensor) -> Decision:
        return Decision((noise[:, : self.noise_width] < self.now).to(student.dtype).T)


class Pair(NamedTuple):
    """What a router must know of the pair: number of spots, widths of both pooled vectors.

    prior    what a learned router adds to every teacher's score at the start
    epochs   of the run
    matched  [epochs, S] rates that another run logged; only `random-matched` needs them
    classes  of the student's logits
    """

    spots: int
    teacher: int
    student: int
    prior: float = 0.0
    epochs: int = 1
    matched: Tensor | None = None
    classes: int = 0


def _adaptive(config: Any, pair: Pair, kind: type[Adaptive] | type[Soft] = Adaptive) -> Router:
    return kind(pair.spots, pair.teacher, pair.student, tau=config.tau, teacher_bias=pair.prior)


def _per_spot(key: str, values: Any, spots: int) -> list[float]:
    """One value per spot, from as many or from one for all. Raises UsageError."""
    if len(values) not in (1, spots):
        raise UsageError(f"{key}: {len(values)} numbers for {spots} spots; the last spot is the logits")
    return [*values] * (spots if len(values) == 1 else 1)


def _fixed(config: Any, pair: Pair) -> Router:
    return Fixed([_per_spot("router.weights", row, pair.spots) for row in config.table])


def _scheduled(config: Any, pair: Pair) -> Router:
    start, stop = (_per_spot(f"router.{key}", getattr(config, key), pair.spots) for key in ("start", "stop"))
    spans = list[tuple[int, int]]()
    for begin, end in zip(start, stop, strict=True):
        if begin > end:
            raise UsageError(f"router.start: {begin:g} is behind router.stop, {end:g}", "equal ones: the spot rests")
        first, last = (int(part * pair.epochs + 1e-9) for part in (begin, end))  # full epochs, as milestones are
        spans.append((first, max(last, first + (begin < end))))
    return Fixed([[float(a < epoch <= b) for a, b in spans] for epoch in range(1, pair.epochs + 1)])


def _matched(config: Any, pair: Pair) -> Router:
    assert pair.matched is not None, "the builder finds the rates before it makes this router"
    return Random(pair.matched)


def _plugged(name: str, kind: type[Router]) -> Callable[[Any, Pair], Router]:
    def made(config: Any, pair: Pair) -> Router:
        router: Router = code.construct(kind, config, pair._asdict() | {"config": config})
        where = code.line_of(router, "__init__") or name
        if not isinstance(config, LearnedConfig) and any(one.requires_grad for one in router.parameters()):
            text = "has weights, and nothing trains them: that needs `settings` of a LearnedConfig, and a gate"
            raise UsageError(f"{where}: {kind.__name__} {text}", code.GUIDE)
        if not isinstance(router.noise_width, int) or router.noise_width < 0:
            text = f"{kind.__name__}.noise_width must be a whole number, not {router.noise_width!r}"
            raise UsageError(f"{where}: {text}", code.GUIDE)
        if kind.decides:
            router.stand_at(pair.spots)  # its own constructor need not have said so
        return router

    return made


_BUILTIN: dict[str, Callable[[Any, Pair], Router]] = {
    "adaptive": _adaptive,
    "anti": lambda config, pair: Anti(_adaptive(config, pair)),
    "always": lambda config, pair: Fixed([[1.0] * pair.spots]),
    "never": lambda config, pair: Fixed([[0.0] * pair.spots]),
    "soft": lambda config, pair: _adaptive(config, pair, Soft),
    "meta": lambda config, pair: Meta(
        pair.spots, pair.teacher, pair.student, pair.classes if config.sees == "class" else None
    ),
    "gradient-agreement": lambda config, pair: Agreement(pair.spots),
    "teacher-correct": lambda config, pair: TeacherCorrect(pair.spots),
    "teacher-confidence": lambda config, pair: Confidence(pair.spots, config.cap),
    "teacher-entropy": lambda config, pair: Entropy(pair.spots, config.cap),
    "wsld": lambda config, pair: WSLD(pair.spots),
    "fixed": _fixed,
    "scheduled": _scheduled,
    "random": lambda config, pair: Random(torch.full((1, pair.spots), config.rate)),
    "random-matched": _matched,
}

ROUTERS = plugins.Table("router", _BUILTIN, plugins.ROUTERS, _plugged, folder="routing")


def build(config: RouterConfig, pair: Pair) -> Router:
    return ROUTERS.row(config.name)(config, pair)
