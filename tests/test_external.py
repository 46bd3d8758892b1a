"""Networks of torchvision, timm and one's own code: each is cut, grafted and trained for one step."""

import copy
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import convnext, swin_transformer, vision_transformer

from sakd_cli.batch import Batch
from sakd_cli.config.networks import find_network
from sakd_cli.config.resolve import ConfigSource, nested, resolve
from sakd_cli.errors import UsageError
from sakd_cli.models import external
from sakd_cli.models.cost import cost
from sakd_cli.models.cutting import cut
from sakd_cli.models.spot import align_stages, spots_at
from sakd_cli.models.staged import Layout, StagedModel, frozen_view, untracked_view
from sakd_cli.models.table import create
from sakd_cli.routing.graft import Graft
from sakd_cli.runs.build import assemble

CLASSES = 5
# Name, side of the images, stages of maps, and how the value between two of them lies: planes, pixels (x), tokens.
ARCHITECTURES = [
    ("torchvision/alexnet", 64, 2, "p"),
    ("torchvision/convnext_tiny", 32, 4, "p"),
    ("torchvision/densenet121", 32, 4, "p"),
    ("torchvision/efficientnet_b0", 32, 4, "p"),
    ("torchvision/googlenet", 32, 4, "p"),
    ("torchvision/mnasnet0_5", 32, 4, "p"),
    ("torchvision/mobilenet_v2", 32, 4, "p"),
    ("torchvision/mobilenet_v3_small", 32, 4, "p"),
    ("torchvision/regnet_y_400mf", 32, 4, "p"),
    ("torchvision/resnet18", 32, 4, "p"),
    ("torchvision/shufflenet_v2_x0_5", 32, 3, "p"),
    ("torchvision/swin_t", 32, 4, "x"),
    ("torchvision/vit_b_32", 64, 4, "t"),
    ("timm/convnext_atto", 32, 4, "p"),
    ("timm/convnextv2_atto", 32, 4, "p"),
    ("timm/edgenext_xx_small", 32, 4, "p"),
    ("timm/efficientnet_lite0", 32, 4, "p"),
    ("timm/ese_vovnet19b_dw", 32, 4, "p"),
    ("timm/eva02_tiny_patch14_224", 56, 4, "t"),
    ("timm/fastvit_t8", 32, 4, "p"),
    ("timm/ghostnet_050", 32, 4, "p"),
    ("timm/lcnet_050", 32, 4, "p"),
    ("timm/mobilenetv3_small_050", 32, 4, "p"),
    ("timm/mobilenetv4_conv_small", 32, 4, "p"),
    ("timm/mobilevit_xxs", 64, 4, "p"),
    ("timm/poolformer_s12", 32, 4, "p"),
    ("timm/regnety_002", 32, 4, "p"),
    ("timm/starnet_s1", 32, 4, "p"),
    ("timm/swin_tiny_patch4_window7_224", 32, 4, "x"),
    ("timm/vit_tiny_patch16_224", 64, 4, "t"),
    ("timm/xcit_nano_12_p16_224", 64, 2, "t"),
]
FORMS = {"p": "planes", "x": "pixels", "t": "tokens"}


def test_there_are_thirty_of_both_libraries() -> None:
    assert len(ARCHITECTURES) >= 30
    assert min(sum(name.startswith(library) for name, *_ in ARCHITECTURES) for library in ("torchvision", "timm")) > 10


def plain(name: str, side: int) -> nn.Module:
    """The library's own network, whole."""
    with external._parameters_on_meta():  # which call fits is tried out; its numbers are not looked at
        call = external.library_call(name, CLASSES, side)
    assert call is not None
    torch.manual_seed(0)
    return call().eval()


class Quarter(convnext.CNBlockConfig):
    def __init__(self, channels: int, after: int | None, count: int) -> None:
        super().__init__(channels // 4, None if after is None else after // 4, count)


@pytest.fixture
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ViT, a Swin and a ConvNeXt of torchvision and a Swin of timm, as deep as they are, with fewer channels.

    They are the smallest that their library has: 0.6 GB to draw, copy and train for nothing.
    """
    vit, swin = vision_transformer._vision_transformer, swin_transformer._swin_transformer
    less = {"hidden_dim": 192, "mlp_dim": 768, "num_heads": 3}
    monkeypatch.setattr(vision_transformer, "_vision_transformer", lambda **given: vit(**given | less))
    monkeypatch.setattr(swin_transformer, "_swin_transformer", lambda **given: swin(**given | {"embed_dim": 48}))
    if find_spec("timm"):
        timms = import_module("timm.models.swin_transformer")
        made = timms._create_swin_transformer
        monkeypatch.setattr(timms, made.__name__, lambda *names, **given: made(*names, **given | {"embed_dim": 48}))
    monkeypatch.setattr(convnext, "CNBlockConfig", Quarter)


@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize(("name", "side", "maps", "form"), ARCHITECTURES, ids=[row[0] for row in ARCHITECTURES])
def test_architecture(name: str, side: int, maps: int, form: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    whole = plain(name, side)
    torch.manual_seed(0)
    model = create(name, CLASSES, side).eval()
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    the_pieces_are_the_whole(model, whole, x, maps, FORMS[form])
    other = create("resnet8", CLASSES, side).eval()
    grafted_both_ways(model, other, x)
    one_step(model, other, x)


def the_pieces_are_the_whole(model: StagedModel, whole: nn.Module, x: Tensor, maps: int, form: str) -> None:
    with torch.no_grad():
        logits = whole(x)
        assert torch.equal(model(x), logits)
        features = model.features(x)
        assert torch.equal(features.logits, logits)
        ends = [x, *(features.raw or features.stages), logits]
        for k in range(len(model.stages) + 1):
            assert torch.equal(model.run(ends[k], k, k + 1), ends[k + 1])
    side = x.shape[-1]
    assert [tuple(f.shape[1:]) for f in features.stages] == [info.shape(side) for info in model.infos]
    assert len(model.map_stages) == maps
    assert form in {info.layout.form for info in model.infos}
    assert model.infos[-1].kind == "embedding"
    # Its weights are the library's, under the library's names, and go back there.
    named = model.plain_state_dict()
    assert named.keys() == whole.state_dict().keys()
    assert all(torch.equal(tensor, named[key]) for key, tensor in whole.state_dict().items())
    parameters = sum(p.numel() for p in model.parameters())
    assert (parameters, cost(whole.to("meta"), side).macs) == cost(model, side) > (0, 0)


def grafted_both_ways(model: StagedModel, other: StagedModel, x: Tensor) -> None:
    with torch.no_grad():
        seen = [(network, frozen_view(network), network.features(x)) for network in (model, other)]
    for (student, ours, own), (teacher, theirs, features) in (seen, seen[::-1]):
        spots = spots_at(student, teacher, align_stages(student, teacher), x.shape[-1])
        graft = Graft(spots, ours.run, theirs.run).eval()
        with torch.no_grad():
            alone, pretrained = (graft(x, features, torch.full((len(x), len(spots)), gate)) for gate in (0.0, 1.0))
        near = {"rtol": 1e-5, "atol": 1e-6 * float(features.logits.abs().max()) + 1e-6}
        torch.testing.assert_close(alone, own.logits, **near)
        torch.testing.assert_close(pretrained, features.logits, **near)


def task_of(student: StagedModel, teacher: StagedModel, side: int, **more: Any) -> Any:
    arguments = {"teacher.source": teacher.name, "student": student.name, "method.name": "at", **more}
    config = resolve("distill", [ConfigSource("test", nested(arguments))]).config
    return assemble(config, student, copy.deepcopy(teacher).requires_grad_(False).eval(), side)


def one_step(student: StagedModel, teacher: StagedModel, x: Tensor) -> None:
    task = task_of(student, teacher, x.shape[-1]).train()
    assert len(task.spots) > 1
    before = [p.detach().clone() for p in student.parameters()]
    noise = torch.rand(len(x), task.noise_width, generator=torch.Generator().manual_seed(2))
    loss = task(Batch(x, torch.arange(len(x)), torch.arange(len(x)), noise)).loss
    assert loss.isfinite()
    loss.backward()
    torch.optim.SGD(student.parameters(), lr=1e-3).step()
    assert all(p.isfinite().all() for p in student.parameters())
    moved = sum(not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert moved > len(before) / 5


REFUSED = {
    "torchvision/squeezenet1_1": "its logits are not what one linear layer gives",
    "timm/deit_tiny_distilled_patch16_224": "its logits are not what one linear layer gives",
    "timm/efficientformer_l1": "fails on images of 32x32 pixels",
    "torchvision/resnet19": "unknown torchvision classifier 'resnet19'; did you mean 'resnet1",
    "timm/resnet19": "unknown timm classifier 'resnet19'; did you mean 'resnet1",
    "torchvision/fcn_resnet50": "unknown torchvision classifier",
    "nowhere.to.be:found": "nowhere.to.be:found: ModuleNotFoundError: No module named 'nowhere'",
    "builtins:dict": "builtins:dict: returned a dict, not an nn.Module",
    "os.path:join": "os.path:join: TypeError",
    "torch.nn:Flatten": "TypeError",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_is_refused_in_a_line(name: str) -> None:
    if name.startswith("timm/"):
        pytest.importorskip("timm")
    with pytest.raises(UsageError) as error:
        create(name, CLASSES, 32)
    assert REFUSED[name] in error.value.message
    assert "\n" not in error.value.message
    assert len(error.value.message) < 200


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    with pytest.raises(UsageError, match="timm/resnet18: timm is not installed") as error:
        create("timm/resnet18", CLASSES)
    assert error.value.hint == "pip install 'sakd[timm]'"


@pytest.mark.parametrize(
    ("name", "family", "kin"),
    [
        ("torchvision/resnet50", "torchvision", "torchvision/resnet"),
        ("torchvision/vit_b_16", "torchvision", "torchvision/vit"),
        ("timm/resnet18.a1_in1k", "timm", "timm/resnet"),
        ("my.nets:small", "factory", "factory/my.nets:small"),
    ],
)
def test_names_are_taken_as_they_are(name: str, family: str, kin: str) -> None:
    network = find_network(name)
    assert (network.name, network.family, network.kin, network.lr) == (name, family, kin, 0.01)


@pytest.mark.parametrize(
    "name", ["torchvision/", "timm/a b", "keras/resnet50", "a.b:", ":f", "a/b:c", "torchvision/../x"]
)
def test_other_forms_are_no_names(name: str) -> None:
    with pytest.raises(UsageError, match="unknown model"):
        find_network(name)


class Whimsical(nn.Module):
    """What torch.fx must be helped with: a dropout as a function, a second argument, writing in place."""

    def __init__(self, num_classes: int, *, shared: bool = False, noisy: bool = False) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.third = self.second if shared else nn.Conv2d(6, 6, 3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(6, num_classes)
        self.noisy = noisy

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.second(self.relu(self.first(x)))
        if mask is not None:
            x = x * mask
        x = self.third(self.relu(x))
        if self.noisy and self.training:
            x = x + torch.randn_like(x)
        return self.fc(nn.functional.dropout(x.mean((2, 3)), 0.5, self.training))


def test_what_a_network_of_ones_own_may_do() -> None:
    model = cut(Whimsical(4), "own", "factory", 4, 32)
    assert [info.size for info in model.infos] == [(16, 16), (8, 8), (4, 4), None]
    x = torch.randn(8, 3, 32, 32)
    torch.manual_seed(1)
    trained = model.train()(x)
    assert not torch.equal(trained, model(x)), "the dropout must still drop"
    assert torch.equal(model.eval()(x), model(x))


def test_no_cut_lies_between_two_uses_of_the_same_weights() -> None:
    model = cut(Whimsical(4, shared=True), "own", "factory", 4, 32)
    assert [info.size for info in model.infos] == [(16, 16), (4, 4), None]
    assert len(model.state_dict()) == len(set(model.plain_names().values())) == 6


@pytest.mark.usefixtures("_narrow")
@pytest.mark.parametrize("name", ["torchvision/resnet18", "timm/vit_tiny_patch16_224", "torchvision/swin_t"])
def test_images_that_are_not_square_are_cut_at_the_same_places(name: str) -> None:
    square, wide, high = (create(name, 4, side) for side in (96, (64, 96), (96, 64)))
    places = [(info.name, info.channels, info.stride, info.layout) for info in square.infos[:-1]]
    for model, share in ((wide, (2 / 3, 1)), (high, (1, 2 / 3))):
        assert [info.name for info in model.infos[:-1]] == [place[0] for place in places]
        assert [(info.channels, info.layout) for info in model.infos[:-1]] == [(place[1], place[3]) for place in places]
        for info, whole in zip(model.infos[:-1], square.infos[:-1], strict=True):
            assert info.size == tuple(round(side * part) for side, part in zip(whole.size, share, strict=True))


@pytest.mark.parametrize(("side", "grid"), [((96, 130), (6, 8)), ((100, 70), (6, 4)), ((50, 50), (3, 3))])
def test_patches_need_not_have_the_images_proportions(side: tuple[int, int], grid: tuple[int, int]) -> None:
    model = create("timm/vit_tiny_patch16_224", 4, side)
    assert {info.size for info in model.infos[:-1]} == {grid}
    assert {info.layout for info in model.infos[:-1]} == {Layout("tokens", 1)}


def test_what_it_may_not_do() -> None:
    with pytest.raises(UsageError, match="it computes in another way while it is trained"):
        cut(Whimsical(4, noisy=True), "own", "factory", 4, 32)


def test_a_sample_that_changes_over_does_not_touch_one_that_does_not(vit: StagedModel) -> None:
    x, other = torch.randn(3, 3, 32, 32), create("resnet8", CLASSES).eval()
    spots = spots_at(vit.eval(), other, align_stages(vit, other), 32)
    graft = Graft(spots, frozen_view(vit).run, other.run).eval()
    gate = torch.zeros(3, len(spots))
    gate[0, 0] = 1
    with torch.no_grad():
        routed = graft(x, other.features(x), gate)
        torch.testing.assert_close(routed[1:], vit(x)[1:], rtol=1e-5, atol=1e-6)
        assert not torch.allclose(routed[0], vit(x)[0], rtol=1e-2)


@pytest.fixture
def vit() -> Iterator[StagedModel]:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    return create("timm/vit_tiny_patch16_224", CLASSES, 32)


def test_views_of_a_cut_network_share_what_they_should(vit: StagedModel) -> None:
    x = torch.randn(2, 3, 32, 32)
    frozen, unrecorded = frozen_view(vit), untracked_view(vit)
    with torch.no_grad():
        next(iter(vit.parameters())).add_(1)
        assert torch.equal(frozen(x), vit.eval()(x))
        assert torch.equal(unrecorded.eval()(x), vit(x))


@pytest.mark.parametrize("layout", [Layout(), Layout("pixels"), Layout("tokens"), Layout("tokens", 2)])
def test_a_layout_gives_the_map_that_entered(layout: Layout) -> None:
    x = torch.randn(2, 3, 4, 5)
    entered = layout.from_map(x)
    assert torch.equal(layout.to_map(entered, (3, 4, 5)), x)
    if layout.prefix:
        assert torch.equal(entered[:, : layout.prefix], x.mean((2, 3))[:, None].expand(-1, layout.prefix, -1))


def test_stages_of_one_stride_are_paired_by_depth(vit: StagedModel) -> None:
    assert align_stages(create("resnet8", CLASSES), vit) == [(1, 1), (2, 3), (3, 4)]
    assert align_stages(vit, create("resnet8", CLASSES)) == [(1, 1), (3, 2), (4, 3)]
