"""Feature aggregation: the mixtures, the two terms of the search and what each of them wants."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from oracles import close
from torch import Tensor, nn
from torch.nn import functional as F

from sakd_cli.batch import Batch, UpperBatch
from sakd_cli.config.methods import DFAConfig
from sakd_cli.distillers.dfa import DFA, BlockGroup, Match, Mixture, connect, mixable_blocks
from sakd_cli.distillers.maps import margins, partial_distance
from sakd_cli.distillers.table import build
from sakd_cli.errors import UsageError
from sakd_cli.models.layers import GlobalPool
from sakd_cli.models.resnet import AFTER_NEXT_NORM, PreActivationBlock
from sakd_cli.models.spot import Spot
from sakd_cli.models.staged import Features, StagedModel, StageInfo
from sakd_cli.models.table import create
from sakd_cli.tasks.search import SearchTask, Sought

SIDE, CLASSES = 16, 5


pytestmark = pytest.mark.usefixtures("float64")


def network(name: str, seed: int = 0) -> StagedModel:
    """With BatchNorm statistics that are not the initial ones."""
    torch.manual_seed(seed)
    model = create(name, CLASSES)
    with torch.no_grad():
        model.train()(torch.randn(16, 3, SIDE, SIDE))
    return model


def teacher_of(name: str = "wrn_22_1") -> StagedModel:
    """Three blocks in every stage, if no other is asked for."""
    return network(name, 1).requires_grad_(False).eval()


def mixer_of(teacher: StagedModel, student: str = "resnet8", **arguments: Any) -> DFA:
    torch.manual_seed(7)
    made = build(DFAConfig(**arguments), network(student), teacher, SIDE).features
    assert isinstance(made, DFA)
    return made


def search_of(teacher: StagedModel, **arguments: Any) -> SearchTask:
    config = DFAConfig(**arguments)
    mixer = mixer_of(teacher, **arguments)
    sought = [Sought(k, mixer.spots[k], mixable_blocks(teacher, mixer.spots[k].teacher)) for k in mixer.to_be_found]
    students = [network("resnet8", 10 + k) for k in range(1 if config.joint else len(sought))]
    torch.manual_seed(8)
    return SearchTask(students, partial(teacher.features, want="blocks"), sought, config, mixer.set_weights).train()


def batch_of(size: int = 6, seed: int = 0, upper: bool = False) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, SIDE, SIDE, generator=draw)
    parts = images, torch.arange(size) % CLASSES, torch.arange(size), torch.empty(size, 0)
    return UpperBatch(*parts, lower=None) if upper else Batch(*parts)


def features(model: StagedModel, batch: Batch) -> Features:
    with torch.no_grad():
        return model.features(batch.images, want="blocks")


def test_weights_lie_on_the_simplex_and_begin_in_its_middle() -> None:
    search = search_of(teacher_of())
    assert all(torch.equal(alpha, torch.full((3,), 1 / 3)) for alpha in search.alphas())
    for beta in search.beta:
        nn.init.normal_(beta, std=5)
    for alpha in search.alphas():
        assert (alpha > 0).all()
        assert abs(alpha.sum().item() - 1) < 1e-6
    made = {name: mixer_of(teacher_of(), weights=name) for name in ("uniform", "last", "random")}
    for k in range(3):
        assert torch.equal(made["uniform"].alpha(k), torch.full((3,), 1 / 3))
        assert made["last"].alpha(k).tolist() == [0, 0, 1]
        assert close(made["random"].alpha(k).sum(), torch.tensor(1.0), 1e-12)
        assert (made["random"].alpha(k) > 0).all()
    assert not torch.equal(made["random"].alpha(0), made["random"].alpha(1))


def test_the_last_block_alone_is_the_plain_feature_loss_bit_for_bit() -> None:
    teacher, batch = teacher_of(), batch_of()
    mixer = mixer_of(teacher, weights="last", norm="none")
    ours, theirs = network("resnet8").features(batch.images), features(teacher, batch)
    losses = mixer(ours, theirs, torch.ones(3, len(batch.labels)), batch)
    for k, (spot, match) in enumerate(zip(mixer.spots, mixer.matches, strict=True)):
        error = match.connector(ours.stages[spot.student]) - theirs.stages[spot.teacher]
        assert torch.equal(losses[k], error.square().flatten(1).mean(dim=1).mean())


def test_a_single_block_is_not_searched_and_is_the_last_one() -> None:
    teacher, batch = teacher_of("wrn_10_1"), batch_of()
    searched, last = (mixer_of(teacher, weights=name) for name in ("search", "last"))
    assert searched.to_be_found == []
    ours, theirs = network("resnet8").features(batch.images), features(teacher, batch)
    ones = torch.ones(3, len(batch.labels))
    assert torch.equal(searched(ours, theirs, ones, batch), last(ours, theirs, ones, batch))


@pytest.mark.parametrize("term", ["st", "ts"])
def test_the_gradient_into_the_mixture_is_the_closed_form(term: str) -> None:
    search, batch = search_of(teacher_of()), batch_of()
    for beta in search.beta:
        nn.init.normal_(beta)
    mixed: list[Tensor] = []
    for match in search.matches:
        match.mixture.register_forward_hook(lambda module, given, out: mixed.append(out))
    found = torch.autograd.grad(getattr(search.losses(batch), term), [*search.beta, *mixed])
    theirs = features(teacher_of(), batch)
    for k, one in enumerate(search.sought):
        alpha, into = search.alphas()[k].detach(), found[3 + k]
        maps = [b / b.square().mean(dim=(1, 2, 3), keepdim=True).sqrt() for b in theirs.blocks[one.spot.teacher]]
        g = torch.stack([(into * x).sum() for x in maps])
        assert close(found[k], alpha * (g - (alpha * g).sum()), 1e-5)
        assert found[k].abs().max() > 0


def test_each_term_reaches_its_own_side_of_the_cut_only() -> None:
    search, batch = search_of(teacher_of()), batch_of()
    for k, one in enumerate(search.sought):
        student, cut = search.network[k], one.spot.student + 1
        before, behind = [*student.stages[:cut].parameters()], [*student.stages[cut:].parameters()]
        behind += [*student.head.parameters(), *search.drops[k].parameters()]
        lift = [*search.matches[k].connector.parameters()]
        losses = search.losses(batch)
        alone = {"st": losses.st, "ts": losses.ts}
        for term, (reached, untouched) in {"st": (before + lift, behind), "ts": (behind, before + lift)}.items():
            got = torch.autograd.grad(alone[term], reached, retain_graph=True)
            assert all(gradient.abs().sum() > 0 for gradient in got)
            none = torch.autograd.grad(alone[term], untouched, retain_graph=True, allow_unused=True)
            assert none == (None,) * len(untouched)
    only = search.losses(batch)
    others = torch.autograd.grad(only.ce, list(search.beta), allow_unused=True)
    assert others == (None,) * 3, "the labels say nothing of the mixtures"


def test_the_groups_share_nothing_unless_they_share_a_student() -> None:
    batch, alone, moved = batch_of(), search_of(teacher_of()), search_of(teacher_of())
    with torch.no_grad():
        moved.beta[0].copy_(torch.tensor([3.0, 0.0, 0.0]))
    gradients = [torch.autograd.grad(task(batch).loss, list(task.parameters())) for task in (alone, moved)]
    names = [name for name, _ in alone.named_parameters()]
    for name, a, b in zip(names, *gradients, strict=True):
        assert torch.equal(a, b) or ".0" in name
    joint = search_of(teacher_of(), joint=True)
    assert len(joint.network) == 1
    assert joint(batch).loss.isfinite()


def test_a_level_changes_nothing_of_the_other_and_foreign_features_are_not_recorded() -> None:
    search = search_of(teacher_of())
    optim = search.optimizer(0.9)
    optim.begin_epoch(1)
    lower = {name: p for name, p in search.named_parameters() if not name.startswith("beta")}
    for step in range(4):
        batch = batch_of(seed=step, upper=step % 2 == 0)
        before = {name: p.detach().clone() for name, p in search.named_parameters()}
        plain = [copy.deepcopy(student) for student in search.network]
        optim.step(search(batch).loss)
        for name, parameter in search.named_parameters():
            assert torch.equal(parameter, before[name]) == ((name in lower) == search.upper_turn), name
        for student, own in zip(search.network, plain, strict=True):
            own.features(batch.images)
            for (name, a), b in zip(student.named_buffers(), own.buffers(), strict=True):
                assert torch.equal(a, b), name


def test_no_scale_of_a_teachers_block_matters_unless_maps_are_taken_raw() -> None:
    teacher, batch = teacher_of(), batch_of()
    group = mixable_blocks(teacher, 2)
    blocks = features(teacher, batch).blocks[2]
    louder = [blocks[0] * 100, *blocks[1:]]
    alpha = torch.tensor([0.5, 0.3, 0.2])
    rms, raw = Mixture(group, "rms"), Mixture(group, "none")
    assert close(rms(louder, alpha), rms(blocks, alpha), 1e-12)
    assert not torch.allclose(raw(louder, alpha), raw(blocks, alpha))
    assert rms([torch.zeros_like(block) for block in blocks], alpha).count_nonzero() == 0


def test_preact_takes_what_the_next_norm_makes_of_every_block() -> None:
    teacher, batch = teacher_of(), batch_of()
    mixture = Mixture(mixable_blocks(teacher, 2), "preact")
    seen = features(teacher, batch)
    norms = [teacher.stages[2][1].bn1, teacher.stages[2][2].bn1, teacher.stages[3][0].bn1]
    for k, norm in enumerate(norms):
        assert close(mixture(seen.blocks[2], torch.eye(3)[k]), norm(seen.blocks[2][k]), 1e-12)
    last = Mixture(mixable_blocks(teacher, 3), "preact")
    with torch.no_grad():
        before = teacher.features(batch.images, want="preactivations").preactivations[3]
    assert close(last(seen.blocks[3], torch.eye(3)[2]), before, 1e-12)
    with pytest.raises(UsageError, match="preact needs a teacher of pre-activation blocks; resnet14 is none"):
        mixer_of(teacher_of("resnet14"), norm="preact")


def test_the_partial_distance_is_that_of_ofd_with_mixed_margins() -> None:
    teacher, batch = teacher_of(), batch_of()
    mixer = mixer_of(teacher, weights="random", norm="preact", distance="partial_l2")
    ours, theirs = network("resnet8").features(batch.images), features(teacher, batch)
    losses = mixer(ours, theirs, torch.ones(3, len(batch.labels)), batch)
    norms = [teacher.stages[1][1].bn1, teacher.stages[1][2].bn1, teacher.stages[2][0].bn1]
    low = sum(a * margins((n.weight, n.bias)) for a, n in zip(mixer.alpha(0), norms, strict=True))
    mixed = mixer.matches[0].mixture(theirs.blocks[1], mixer.alpha(0))
    expected = partial_distance(mixer.matches[0].connector(ours.stages[1]), mixed, low)
    assert close(losses[0], expected.mean() / mixed[0].numel(), 1e-12)


def test_of_several_widths_the_commonest_is_mixed_and_where_none_is_the_network_is_refused() -> None:
    teacher = create("MobileNetV2", CLASSES)
    groups = [mixable_blocks(teacher, stage) for stage in teacher.map_stages]
    assert [(group.places, group.width) for group in groups] == [
        ((1, 2), 24),
        ((0, 1, 2), 32),
        ((0, 1, 2, 3), 64),
        ((0, 1, 2), 160),
    ]
    infos = list(teacher.infos)
    infos[2] = infos[2]._replace(blocks=(32, 40, 40, 32))
    teacher.infos = tuple(infos)
    with pytest.raises(UsageError, match="MobileNetV2 cannot be mixed at stage2: widths of its blocks: 32, 40, 40, 32"):
        mixable_blocks(teacher, 2)


def test_the_terms_want_opposite_things() -> None:
    """The recipe: block 1 is a fixed linear map of the student's own map, block 2 says the class alone."""
    torch.manual_seed(0)
    size, classes = 512, 4
    x, labels = torch.randn(size, 4, 2, 2), torch.randint(classes, (size,))
    first = torch.einsum("ij,bjhw->bihw", torch.randn(6, 4), x)
    second = torch.randn(classes, 6)[labels][:, :, None, None].expand(-1, -1, 2, 2).contiguous()
    beta = torch.zeros(2, requires_grad=True)
    match = Match(
        Spot("toy", "map", 1, 1, (4, 2, 2), (6, 2, 2)), BlockGroup(1, "toy", "toy", (0, 1), 6, None), DFAConfig()
    )
    drop, head = connect((6, 2, 2), (4, 2, 2)), nn.Linear(4, classes)

    def terms() -> tuple[Tensor, Tensor]:
        alpha = beta.softmax(0)
        mixed = match.mixture([first, second], alpha)
        return match(match.connector(x), mixed, alpha).mean(), F.cross_entropy(
            head(drop(mixed).mean(dim=(2, 3))), labels
        )

    fit = torch.optim.Adam([*match.parameters(), *drop.parameters(), *head.parameters()], lr=0.02)
    for _ in range(400):
        fit.zero_grad()
        sum(terms()).backward()
        fit.step()
    st, ts = (torch.autograd.grad(term, beta, retain_graph=True)[0] for term in terms())
    assert st[1] - st[0] > 0
    assert ts[1] - ts[0] < 0


def tiny(blocks: int, width: int) -> StagedModel:
    """A pre-activation network of two groups for images of 8 pixels."""
    stages: list[tuple[StageInfo, nn.Module]] = [(StageInfo("stem", width, 1), nn.Conv2d(3, width, 3, padding=1))]
    for group in (1, 2):
        inputs = width * max(1, group - 1)
        made = [PreActivationBlock(inputs, width * group, group)]
        made += [PreActivationBlock(width * group, width * group, 1) for _ in range(blocks - 1)]
        info = StageInfo(f"stage{group}", width * group, group, blocks=(width * group,) * blocks)
        stages.append((info, nn.Sequential(*made)))
    pool = nn.Sequential(nn.BatchNorm2d(2 * width), nn.ReLU(), GlobalPool())
    stages.append((StageInfo("pool", 2 * width, 0), pool))
    return StagedModel(name="tiny", family="wrn", stages=stages, num_classes=CLASSES, preactivation=AFTER_NEXT_NORM)


def small_images(count: int, seed: int) -> Batch:
    """Two waves of a class's own frequencies, shifted at random, in noise: the class is not in any single pixel."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % CLASSES
    shift = 6.3 * torch.rand(count, 1, 1, 1, generator=draw)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    turn = (labels * 3.14159 / CLASSES).view(-1, 1, 1, 1)
    wave = torch.sin(1.6 * (turn.cos() * x + turn.sin() * y) + shift)
    images = wave.expand(-1, 3, -1, -1) + 0.5 * torch.randn(count, 3, 8, 8, generator=draw)
    return Batch(images.float(), labels, torch.arange(count), torch.empty(count, 0))


@pytest.fixture(scope="module")
def trained() -> StagedModel:
    torch.manual_seed(0)
    teacher = tiny(3, 8).float().train()
    fit = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for step in range(25):
        batch = small_images(64, step)
        loss = F.cross_entropy(teacher(batch.images), batch.labels)
        fit.zero_grad()
        loss.backward()
        fit.step()
    assert loss < 0.7
    return teacher.requires_grad_(False).eval()


@pytest.mark.parametrize("term", ["st", "ts"])
def test_searched_by_one_term_alone_the_mass_goes_to_its_end_of_the_group(trained: StagedModel, term: str) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(1)
    common = {"st": 0.0, "ts": 0.0, "arch_lr": 0.1, "arch_reg": "none", "search_epochs": 1, "search_ce": False}
    arguments = DFAConfig(**common | {term: 1.0})
    students = [tiny(1, 6) for _ in (1, 2)]
    shapes = [(info.shape(8), other.shape(8)) for info, other in zip(students[0].infos, trained.infos, strict=True)]
    sought = [
        Sought(k - 1, Spot(f"stage{k}", "map", k, k, *shapes[k]), mixable_blocks(trained, k))
        for k in trained.map_stages
    ]
    found: dict[int, Tensor] = {}
    search = SearchTask(
        students,
        partial(trained.features, want="blocks"),
        sought,
        arguments,
        lambda k, alpha, beta: found.update({k: alpha}),
    ).train()
    optim = search.optimizer(0.9)
    optim.begin_epoch(1)
    for step in range(80):
        batch = small_images(32, 1000 + step)
        parts = batch.images, batch.labels, batch.index, batch.noise
        optim.step(search(batch if step % 2 else UpperBatch(*parts, lower=None)).loss)
    search.settle()
    for alpha in found.values():
        assert (alpha[0] > alpha[-1]) == (term == "st"), alpha
