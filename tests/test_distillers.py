"""The contract of every registered distiller, on two small networks' features: to be registered is to be tested.

Each loss is compared with its plain definition (`plain_losses.py`), on the whole batch and on the chosen rows alone.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from oracles import close
from plain_losses import PLAIN
from safetensors.torch import load, save
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sakd_cli.batch import Batch
from sakd_cli.config.method import WarmedConfig
from sakd_cli.config.methods import METHODS
from sakd_cli.config.train import Train
from sakd_cli.distillers.distiller import Distiller
from sakd_cli.distillers.relations import CRD, memory_need
from sakd_cli.distillers.table import DISTILLERS, build
from sakd_cli.engine.optim import Optimizer
from sakd_cli.errors import MemoryLimitError, UsageError
from sakd_cli.models.staged import Features, StagedModel
from sakd_cli.models.table import create
from sakd_cli.tasks.pretrain import WarmupTask

CLASSES, SIDE, N, IMAGES = 10, 16, 7, 60
PAIR, ONE_WIDTH = ("resnet8", "wrn_10_2"), ("resnet8", "resnet14")
SEVERAL_BLOCKS = ("resnet8", "wrn_16_2")
NEED_ONE_WIDTH = {"fsp", "kdsvd"}
LABELS = torch.arange(IMAGES) * 7 % CLASSES
SETTINGS: dict[str, dict[str, Any]] = {  # where the default is too large for this toy
    "crd": {"negatives": 9, "width": 8},
    "cc": {"width": 8},
    "dfa": {"weights": "random"},
}


pytestmark = pytest.mark.usefixtures("float64")


# --- what they are tried on


class Trial(NamedTuple):
    """A method's own distiller (the feature one; of a method at the logits, that one) and what it is called with."""

    name: str
    distiller: Any
    student: Features
    teacher: Features
    batch: Batch

    def pair(self, k: int) -> tuple[Tensor, Tensor]:
        """Student's and teacher's tensor at spot k."""
        spot = self.distiller.spots[k]
        if spot.kind == "logits":
            return self.student.logits, self.teacher.logits
        if self.distiller.want == "blocks":  # the teacher's side: all of them, [N, blocks, C, H, W]
            return self.student.stages[spot.student], torch.stack(self.teacher.blocks[spot.teacher], dim=1)
        ours, theirs = (
            f.preactivations if self.distiller.want == "preactivations" else f.stages for f in self.features
        )
        return ours[spot.student], theirs[spot.teacher]

    @property
    def features(self) -> tuple[Features, Features]:
        return self.student, self.teacher

    def with_rows(self, rows: list[int]) -> "Trial":
        """The same with these samples' features, as new leaves; the batch stays."""
        both = [leaves_of(f, lambda x: x.detach()[rows]) for f in self.features]
        return self._replace(student=both[0], teacher=both[1])

    def losses(self, weight: Tensor) -> Tensor:
        return self.distiller(self.student, self.teacher, weight, self.batch)

    @property
    def leaves(self) -> list[Tensor]:
        """Tensors that must get a gradient: the student's at the spots, and the distiller's parameters."""
        return [self.pair(k)[0] for k in range(len(self.distiller.spots))] + [
            parameter for parameter in self.distiller.parameters() if parameter.requires_grad
        ]


def leaves_of(features: Features, change: Callable[[Tensor], Tensor]) -> Features:
    """The features, changed, each a leaf of its own."""
    stages, before, *blocks = (
        tuple(change(x).requires_grad_() for x in maps)
        for maps in (features.stages, features.preactivations, *features.blocks)
    )
    return Features(stages, change(features.logits).requires_grad_(), before, tuple(blocks))


def images_of() -> Tensor:
    return torch.randn(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(11), dtype=torch.float64)


@functools.cache
@torch.no_grad()
def seen_all(network: StagedModel) -> Features:
    """Everything that any method may ask for of these images; the networks of all but SimKD are the same."""
    blocks = network.features(images_of(), want="blocks").blocks
    want = "preactivations" if network.has_preactivations else "stages"
    return network.features(images_of(), want)._replace(blocks=blocks)


@functools.cache
def networks(pair: tuple[str, str]) -> tuple[StagedModel, StagedModel]:
    torch.manual_seed(5)
    return tuple(create(name, CLASSES).double().eval() for name in pair)


def pair_of(name: str) -> tuple[str, str]:
    """The networks a method is tried on: of different widths, unless it needs equal ones or blocks to mix."""
    return {"dfa": SEVERAL_BLOCKS}.get(name, ONE_WIDTH if name in NEED_ONE_WIDTH else PAIR)


def made_of(name: str, pair: tuple[str, str] | None = None, **more: Any) -> tuple[Distiller, StagedModel]:
    """Its own distiller, and the network that learns."""
    student, teacher = networks(pair or pair_of(name))
    torch.manual_seed(7)
    config = METHODS[name](**SETTINGS.get(name, {}))
    made = build(config, student, teacher, SIDE, labels=LABELS, batch_size=N, **more)
    return (made.logits if made.features is None else made.features), made.network.double().eval()


def distiller_of(name: str, pair: tuple[str, str] | None = None) -> Distiller:
    return made_of(name, pair)[0]


def trial(name: str, **more: Any) -> Trial:
    assert name in PLAIN, f"{name}: write its plain definition in tests/plain_losses.py"
    index = torch.tensor([41, 3, 17, 58, 0, 22, 35])
    batch = Batch(images=images_of(), labels=LABELS[index], index=index, noise=torch.empty(N, 0))
    distiller, student = made_of(name, **more)
    both = [leaves_of(seen_all(network), torch.clone) for network in (student, networks(pair_of(name))[1])]
    return Trial(name, distiller, *both, batch)


def plain(case: Trial, k: int, rows: Tensor) -> Tensor:
    """The plain loss of the rows that are True, times n/N; 0 of none."""
    spots = range(len(case.distiller.spots))
    s, t = PLAIN[case.name].before(case.distiller, [case.pair(spot) for spot in spots])[k]
    if not rows.any():
        return s.sum() * 0
    loss = PLAIN[case.name].loss(case.distiller, k, s[rows], t[rows], case.batch.labels[rows], case.batch.index[rows])
    return loss * rows.sum() / len(rows)


METHOD = pytest.mark.parametrize("name", sorted(DISTILLERS))
SELECTIONS = ("all", "none", "one", "two", "three", "five")


def selection(word: str, spots: int) -> Tensor:
    """Bool [K, N]: so many of N samples, others at each spot."""
    generator = torch.Generator().manual_seed(2)
    n = {"all": N, "none": 0, "one": 1, "two": 2, "three": 3, "five": 5}[word]
    return torch.stack([torch.randperm(N, generator=generator) < n for _ in range(spots)])


def gradients(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    """Zeros where the plain form does not reach a tensor; ours must reach all of them."""
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


@METHOD
@pytest.mark.parametrize("word", SELECTIONS)
def test_a_selection_gives_the_plain_loss_of_its_rows_times_its_share(name: str, word: str) -> None:
    case = trial(name)
    rows = selection(word, len(case.distiller.spots))
    expected = torch.stack([plain(case, k, counted) for k, counted in enumerate(PLAIN[name].counted(rows))])
    expected_gradients = gradients(expected.sum(), case.leaves)
    ours = case.losses(rows.double())
    assert ours.shape == (len(rows),)
    assert close(ours, expected, 1e-10, 1e-13)
    for gradient, other in zip(torch.autograd.grad(ours.sum(), case.leaves), expected_gradients, strict=True):
        assert close(gradient, other, 1e-8, 1e-11)


@METHOD
def test_nothing_chosen_gives_exact_zeros_and_not_nothing(name: str) -> None:
    case = trial(name)
    losses = case.losses(torch.zeros(len(case.distiller.spots), N))
    assert torch.equal(losses, torch.zeros_like(losses))
    for gradient in torch.autograd.grad(losses.sum(), case.leaves):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@METHOD
@pytest.mark.parametrize("word", ["none", "one", "three"])
def test_leaving_rows_out_changes_nothing(name: str, word: str) -> None:
    found = []
    for dynamic_shapes in (False, True):
        case = trial(name)
        case.distiller.dynamic_shapes = dynamic_shapes
        losses = case.losses(selection(word, len(case.distiller.spots)).double())
        found.append([losses, *torch.autograd.grad(losses.sum(), case.leaves)])
    assert all(close(ours, fixed, 1e-10, 1e-13) for fixed, ours in zip(*found, strict=True))


@pytest.mark.parametrize("name", ["rkd", "cc"])
def test_relations_need_two_samples(name: str) -> None:
    case = trial(name)
    losses = case.losses(torch.eye(N)[:1])
    assert torch.equal(losses, torch.zeros_like(losses))
    assert all(torch.count_nonzero(gradient) == 0 for gradient in torch.autograd.grad(losses.sum(), case.leaves))


@METHOD
def test_a_batch_of_one_is_no_accident(name: str) -> None:
    case = trial(name)
    batch = Batch(**{key: getattr(case.batch, key)[:1] for key in ("images", "labels", "index", "noise")})
    case = case.with_rows([0])._replace(batch=batch)
    losses = case.losses(torch.ones(len(case.distiller.spots), 1))
    assert losses.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), case.leaves))


@METHOD
def test_equal_samples_keep_gradients_finite(name: str) -> None:
    case = trial(name).with_rows([0, 0, 2, 3, 4, 5, 6])
    losses = case.losses(torch.ones(len(case.distiller.spots), N))
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(losses.sum(), case.leaves))
    assert losses.isfinite().all()


@METHOD
def test_the_teacher_gets_no_gradient(name: str) -> None:
    case = trial(name)
    loss = case.losses(torch.ones(len(case.distiller.spots), N)).sum()
    theirs = [*case.teacher.stages, *case.teacher.preactivations, case.teacher.logits, *sum(case.teacher.blocks, ())]
    assert torch.autograd.grad(loss, theirs, allow_unused=True) == (None,) * len(theirs)


@pytest.mark.parametrize("name", sorted(set(DISTILLERS) - {"cc"}))
def test_the_order_of_the_batch_does_not_matter(name: str) -> None:
    case, again = trial(name), trial(name)
    rows, order = selection("five", len(case.distiller.spots)).double(), torch.tensor([4, 2, 6, 0, 5, 1, 3])
    batch = Batch(**{key: getattr(again.batch, key)[order] for key in ("images", "labels", "index", "noise")})
    again = again.with_rows(order.tolist())._replace(batch=batch)
    assert close(again.losses(rows[:, order]), case.losses(rows), 1e-11, 1e-14)


@METHOD
def test_it_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    two = {"stage_map": [(1, 1), (2, 2)]} if name == "kdsvd" else {}  # its third stage is traced like its second, 4 s
    case, again = trial(name, **two), trial(name, **two)
    rows = selection("three", len(case.distiller.spots)).double()
    compiled = torch.compile(again.distiller, fullgraph=True, backend="eager")
    losses, expected = compiled(again.student, again.teacher, rows, again.batch), case.losses(rows)
    assert close(losses, expected, 1e-12, 1e-15)
    for a, b in zip(gradients(losses.sum(), again.leaves), gradients(expected.sum(), case.leaves), strict=True):
        assert close(a, b, 1e-10, 1e-14)


class NoRead(TorchDispatchMode):
    """Fails where the host reads the device or a shape depends on values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        assert not name.startswith(("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select")), name
        if name.startswith("aten::index"):
            listed = [x for x in torch.utils._pytree.tree_leaves(args[1:]) if isinstance(x, Tensor)]
            assert not any(x.dtype in (torch.bool, torch.uint8) for x in listed[:1]), name
        return func(*args, **(kwargs or {}))


@METHOD
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    case = trial(name)
    rows = selection("three", len(case.distiller.spots)).double()
    with NoRead():
        case.losses(rows).sum().backward()


@METHOD
@pytest.mark.parametrize("pair", [("resnet8", "resnet14"), ("resnet8", "vgg8"), ("vgg8", "resnet8")], ids="-".join)
def test_every_pair_of_networks_has_its_spots(name: str, pair: tuple[str, str]) -> None:
    if name in NEED_ONE_WIDTH and pair != ONE_WIDTH:
        pytest.skip("needs equal widths; the refusal has a test of its own")
    distiller, network = made_of(name, pair)
    with torch.no_grad():
        student, teacher = (seen_all(one) for one in (network, networks(pair)[1]))
        batch = Batch(images=images_of(), labels=LABELS[:N], index=torch.arange(N), noise=torch.empty(N, 0))
        assert distiller(student, teacher, torch.ones(len(distiller.spots), N), batch).isfinite().all()
    for spot in distiller.spots:
        if spot.kind != "logits":
            assert student.stages[spot.student].shape[1:] == spot.student_shape
            assert teacher.stages[spot.teacher].shape[1:] == spot.teacher_shape


@METHOD
def test_its_state_can_be_saved_and_put_back(name: str) -> None:
    case, again = trial(name), trial(name)
    rows = selection("three", len(case.distiller.spots)).double()
    case.losses(rows)
    again.distiller.load_state_dict(load(save(case.distiller.state_dict())))
    assert close(again.losses(rows), case.losses(rows), 0.0)


@pytest.mark.parametrize("name", sorted(name for name, kind in METHODS.items() if issubclass(kind, WarmedConfig)))
def test_a_warmup_lowers_its_loss_and_is_frozen_afterwards(name: str) -> None:
    student, teacher = (copy.deepcopy(network) for network in networks(ONE_WIDTH))
    teacher.requires_grad_(False)
    warmup = build(METHODS[name](), student, teacher, SIDE).warmup
    assert warmup is not None
    assert not any(parameter.requires_grad for parameter in warmup.parameters())
    images = torch.randn(N, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    task = WarmupTask(student, teacher, warmup, lr=0.01, weight_decay=0.0).train()
    optimizer = Optimizer(task.groups(), Train())
    batch = Batch(images=images, labels=LABELS[:N], index=torch.arange(N), noise=torch.empty(N, 0))
    losses = []
    for _ in range(5):
        output = task(batch)
        losses.append(output.loss.item())
        optimizer.step(output.loss)
    assert losses[-1] < losses[0]


def test_networks_that_a_method_cannot_use_are_refused() -> None:
    for name in sorted(NEED_ONE_WIDTH):
        with pytest.raises(UsageError, match=f"method {name}: stage .* must be equal"):
            distiller_of(name, PAIR)
    blind, seeing = create("MobileNetV2", CLASSES), networks(PAIR)[1]
    for name, student, teacher in (("ab", blind, seeing), ("ofd", blind, seeing), ("ofd", seeing, blind)):
        with pytest.raises(UsageError, match=f"^method {name} needs .*; MobileNetV2 has none$"):
            build(METHODS[name](), student, teacher, 32)
    with pytest.raises(UsageError, match="one stage only"):
        build(METHODS["kdsvd"](), *networks(ONE_WIDTH), SIDE, stage_map=[(2, 2)])


def test_the_variance_of_vid_starts_at_five() -> None:
    gaussian = distiller_of("vid").gaussians[0]
    assert close(gaussian.variance(), torch.full((32,), 5.0), 1e-12)


def crd_of(**arguments: Any) -> CRD:
    made = build(METHODS["crd"](**arguments), *networks(PAIR), SIDE, labels=LABELS, batch_size=N).features
    assert isinstance(made, CRD)
    return made


def test_crd_draws_other_classes_without_replacement_and_evenly() -> None:
    torch.manual_seed(0)
    distiller, index = crd_of(negatives=20), torch.arange(IMAGES)
    counts, together = torch.zeros(IMAGES, IMAGES), 0
    for _ in range(400):
        rows = distiller.draw(index, LABELS)
        distiller.calls.add_(1)
        assert torch.equal(rows[:, 0], index)
        assert (LABELS[rows[:, 1:]] != LABELS[:, None]).all()
        assert all(len(set(row)) == 20 for row in rows[:, 1:].tolist())
        counts.scatter_add_(1, rows[:, 1:], torch.ones(IMAGES, 20))
        together += len(set(rows[0, 1:].tolist()) & set(rows[10, 1:].tolist()))
    others = LABELS[:, None] != LABELS[None, :]
    share = 20 / 54
    deviation = (counts[others] - 400 * share) / (400 * share * (1 - share)) ** 0.5
    assert abs(float(deviation.square().mean()) - 1) < 0.1  # binomial
    assert float(deviation.abs().max()) < 5
    assert abs(together / (400 * 20 * share) - 1) < 0.02  # two samples of a class share no more than by chance


def test_crd_goes_on_with_the_same_draws_after_a_restart() -> None:
    case = trial("crd")
    weight = torch.ones(1, N)
    case.losses(weight)
    torch.manual_seed(99)
    again = crd_of(**SETTINGS["crd"])
    assert not torch.equal(again.draw(*(first := (case.batch.index, case.batch.labels))), case.distiller.draw(*first))
    again.load_state_dict(case.distiller.state_dict())
    other = case._replace(distiller=again)
    for _ in range(2):
        assert torch.equal(case.losses(weight), other.losses(weight))
    assert int(again.calls) == 3


def test_crd_refuses_before_it_takes_the_memory() -> None:
    assert 0.1 < memory_need(50_000, 64, 128, 16384) / 2**30 < 0.2
    need = memory_need(IMAGES, N, 128, 54) / 2**30
    with pytest.raises(MemoryLimitError, match=r"60 images need .* above method\.memory_limit"):
        crd_of(memory_limit=need * 0.99)
    assert crd_of(memory_limit=need * 1.01).negatives == 54
    with pytest.raises(UsageError, match="one class"):
        build(METHODS["crd"](), *networks(PAIR), SIDE, labels=torch.zeros(5).long())
    with pytest.raises(UsageError, match="needs the labels"):
        build(METHODS["crd"](), *networks(PAIR), SIDE)


def test_every_plain_definition_belongs_to_a_method() -> None:
    assert set(PLAIN) == set(DISTILLERS)
