"""The model contract: a network is an ordered list of stages and a head, and can be run from any stage to any other.

Stage 0 is the stem, stages 1 .. L-2 give maps, stage L-1 gives the pooled vector, stage L is the head. Segments are
half-open: `run(run(x, 0, k), k, L + 1)` equals `forward(x)` for every k, bit for bit in evaluation mode.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from sakd_cli.config.preprocessing import ImageSize, height_width
from sakd_cli.errors import UsageError

Shape = tuple[int, ...]
Channels = tuple[float, ...]
Want = Literal["stages", "blocks", "preactivations"]
Mark = Callable[[int, Tensor], Tensor]


def unmarked(stage: int, x: Tensor) -> Tensor:
    return x


class Layout(NamedTuple):
    """How the value between two stages holds a map, some tokens of which are of no place.

    planes: [N, C, H, W], the map itself. pixels: [N, H, W, C]. tokens: [N, prefix + H W, C], row by row.

    The `prefix` tokens (class token, distillation token, registers) are of the whole image. A map has no room for them:
    they stay in the value that the network hands on, and only what stands for it at a spot is without them.
    """

    form: Literal["planes", "pixels", "tokens"] = "planes"
    prefix: int = 0

    def to_map(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What a spot sees of the value: the map [N, C, H, W]; `shape` is (C, H, W). A view, no copy."""
        if self.form == "pixels":
            return x.permute(0, 3, 1, 2)
        if self.form == "tokens":
            return x[:, self.prefix :].transpose(1, 2).unflatten(2, shape[1:])
        return x

    def from_map(self, x: Tensor) -> Tensor:
        """A map [N, C, H, W] of another network as the value that this network continues with.

        Its prefix tokens are the mean of its own: nothing of the network it enters is used, so that all of what the
        router sees behind a change of networks has come through the adapter. The paper has no networks with tokens.
        """
        if self.form == "pixels":
            return x.permute(0, 2, 3, 1)
        if self.form == "tokens":
            tokens = x.flatten(2).transpose(1, 2)
            prefix = tokens.mean(dim=1, keepdim=True).expand(-1, self.prefix, -1)
            return torch.cat([prefix, tokens], dim=1) if self.prefix else tokens
        return x


PLANES = Layout()


class StageInfo(NamedTuple):
    """What a stage declares: its name, width, stride relative to the image (0 for a pooled vector).

    halved_from   a stage that pools large maps only: from this height of the image on, its stride is twice as large
    signed        its output can be negative: it does not end in a ReLU
    blocks        width of each of its blocks' outputs, all of one size; empty for stem and pooling, which have none
    size          height and width of its map where they were measured: at the one side the network was cut for
    layout        how its map lies in the value that the next stage gets
    """

    name: str
    channels: int
    stride: int
    halved_from: int | None = None
    signed: bool = False
    blocks: tuple[int, ...] = ()
    size: tuple[int, int] | None = None
    layout: Layout = PLANES

    @property
    def kind(self) -> Literal["map", "embedding"]:
        return "map" if self.stride else "embedding"

    def shape(self, side: ImageSize) -> Shape:
        """Shape of one sample's feature for an image of `side` pixels: (C, H, W), or (C,) when pooled.

        Height and width are multiples of the largest stride; elsewhere families round differently.
        """
        if not self.stride:
            return (self.channels,)
        if self.size is not None:
            return (self.channels, *self.size)
        height, width = height_width(side)
        stride = self.stride if self.halved_from is None or height < self.halved_from else 2 * self.stride
        return (self.channels, height // stride, width // stride)


class Features(NamedTuple):
    """One tensor per stage ([N, C, H, W], the last one [N, C]) and the logits [N, classes].

    preactivations   empty unless asked for: per stage its output in front of the last activation, where the family has
                     such a version of it; elsewhere (stem, pooled vector) the output itself. Shapes as in `stages`
    blocks           empty unless asked for: per stage the outputs of its blocks, as `StageInfo.blocks` declares them
    raw              per stage the value that the next stage gets; empty where these are the maps themselves
    """

    stages: tuple[Tensor, ...]
    logits: Tensor
    preactivations: tuple[Tensor, ...] = ()
    blocks: tuple[tuple[Tensor, ...], ...] = ()
    raw: tuple[Tensor, ...] = ()

    def map(self, change: Callable[[Tensor], Tensor]) -> "Features":
        blocks = tuple(tuple(map(change, maps)) for maps in self.blocks)
        before = tuple(map(change, self.preactivations))
        raw = tuple(map(change, self.raw))
        return Features(tuple(map(change, self.stages)), change(self.logits), before, blocks, raw)

    def with_logits(self, logits: Tensor) -> "Features":
        """The same with other logits. (What `_replace` makes cannot leave a compiled region in torch 2.11.)"""
        return Features(self.stages, logits, self.preactivations, self.blocks, self.raw)

    def tensors(self) -> list[Tensor]:
        return [*self.stages, self.logits, *self.preactivations, *(x for maps in self.blocks for x in maps), *self.raw]

    def only(self, want: Want, places: Collection[int], more: Collection[int] = ()) -> "Features":
        """What `want` names, at these stages alone, and of the maps `more`; pooled vector and logits stay.

        All else is given up: empty in its place.
        """
        none, maps = self.logits.new_empty(0), {*more, *(places if want == "stages" else ())}
        before, blocks = (places if want == name else () for name in ("preactivations", "blocks"))
        return Features(
            tuple(x if k in maps or k == len(self.stages) - 1 else none for k, x in enumerate(self.stages)),
            self.logits,
            tuple(x if k in before else none for k, x in enumerate(self.preactivations)),
            tuple(of if k in blocks else () for k, of in enumerate(self.blocks)),
            tuple(x if k in maps else none for k, x in enumerate(self.raw)),
        )

    @property
    def embedding(self) -> Tensor:
        """The pooled vector in front of the head, [N, C]."""
        return self.stages[-1]


# Weight and bias of a BatchNorm, [C] each: standard deviation (but for its sign) and mean of what it gives.
Affine = tuple[Tensor, Tensor]


class Preactivation(NamedTuple):
    """How a family of networks is seen in front of its activations. Both get all stages.

    run      images to the output of every stage, as `features` gives it, and beside it every stage's version in front
             of its activation, which has passed through the mark
    affines  for every stage of maps behind the stem, the BatchNorm that makes this version (of a sum: its last one);
             weight and bias 0 for channels that pass it by
    behind   of a network of pre-activation blocks: for the same stages, the BatchNorm that reads each block's output
    """

    run: Callable[[Iterable[nn.Module], Tensor, Mark], tuple[list[Tensor], list[Tensor]]]
    affines: Callable[[Iterable[nn.Module]], list[Affine]]
    behind: Callable[[Iterable[nn.Module]], list[list[nn.BatchNorm2d]]] | None = None


class Relayout(nn.Module):
    """A change of a map, or into or from one (`Layout`), as a module, for chains of them."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        return self.change(x)


class StagedModel(nn.Module):
    """A classifier cut into stages; a family of networks only provides the stages and their infos.

    preactivation  the stages in front of their activations; None: not defined for the family
    head           the last layer where there is one already, named `head_name` in its own network
    """

    gain: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        name: str,
        family: str,
        stages: Sequence[tuple[StageInfo, nn.Module]],
        num_classes: int,
        preactivation: Preactivation | None,
        *,
        head: nn.Linear | None = None,
        head_name: str = "head",
    ) -> None:
        super().__init__()
        self.name = name
        self.family = family
        self.num_classes = num_classes
        self.infos = tuple(info for info, _ in stages)
        self.stages = nn.ModuleList([stage for _, stage in stages])
        self._preactivation = preactivation
        self.head = nn.Linear(self.infos[-1].channels, num_classes) if head is None else head
        self.head_name = head_name
        self._has_raw_values = any(info.layout != PLANES for info in self.infos)
        # Not saved: they belong to the images that it is given, not to the network.
        self.register_buffer("gain", None, persistent=False)
        self.register_buffer("shift", None, persistent=False)

    def plain_names(self) -> dict[str, str]:
        """Name of each of its tensors -> its name in the network that was cut (`models/cutting.py`)."""
        names = {}
        for name in self.state_dict():
            part, _, rest = name.partition(".")
            names[name] = f"{self.head_name}.{rest}" if part == "head" else rest.partition(".")[2]
        return names

    def plain_state_dict(self) -> dict[str, Tensor]:
        """The weights of a network that was cut, as that network itself (torchvision's, timm's) loads them."""
        names = self.plain_names()
        return {names[name]: tensor for name, tensor in self.state_dict().items()}

    def set_input_normalization(self, mean: Channels, std: Channels, *, given: tuple[Channels, Channels]) -> None:
        """Convert images that are normalised by `given` (mean, std) to this network's own mean and std, from now on.

        One affine per channel in front of the first stage; nothing at all where both are equal.
        """
        theirs = [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in given]
        ours = [torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (mean, std)]
        equal = tuple(given[0]) == tuple(mean) and tuple(given[1]) == tuple(std)
        place = self.head.weight
        self.gain = None if equal else (theirs[1] / ours[1]).to(place)
        self.shift = None if equal else ((theirs[0] - ours[0]) / ours[1]).to(place)

    def _normalize_input(self, images: Tensor) -> Tensor:
        return images if self.gain is None or self.shift is None else images * self.gain + self.shift

    @property
    def map_stages(self) -> tuple[int, ...]:
        """Indices of the stages between stem and pooling, where maps can be distilled."""
        return tuple(range(1, len(self.infos) - 1))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W] to logits [N, classes]."""
        return self.run(x, 0, len(self.stages) + 1)

    def features(self, x: Tensor, want: Want = "stages", mark: Mark = unmarked) -> Features:
        """Images [N, 3, H, W] to the output of every stage and the logits; `want` says what else is filled in.

        A stage that declares blocks is a sequence of just these. UsageError where the family has no pre-activations.
        Each stage's value passes through `mark`, which returns it; of pre-activations, these do.
        """
        x = self._normalize_input(x)
        if want == "preactivations":
            stages, before = self._require_preactivation().run(self.stages, x, mark)
            return Features(tuple(stages), self.head(stages[-1]), tuple(before))
        outputs: list[Tensor] = []
        blocks: list[tuple[Tensor, ...]] = []
        for place, (info, stage) in enumerate(zip(self.infos, self.stages, strict=True)):
            inside: list[Tensor] = []
            for part in cast(nn.Sequential, stage) if want == "blocks" and info.blocks else (stage,):
                x = part(x)
                inside.append(x)
            x = mark(place, x)
            outputs.append(x)
            blocks.append(tuple(inside) if info.blocks else ())
        if self._has_raw_values:
            return Features(tuple(map(self.to_map, outputs, range(len(outputs)))), self.head(x), raw=tuple(outputs))
        return Features(tuple(outputs), self.head(x), blocks=tuple(blocks) if want == "blocks" else ())

    def to_map(self, x: Tensor, stage: int) -> Tensor:
        """Of what a stage hands on, what a spot sees: the map [N, C, H, W], or the pooled vector."""
        info = self.infos[stage]
        return info.layout.to_map(x, (info.channels, *(info.size or ())))

    def norms_behind_blocks(self, stage: int) -> list[nn.BatchNorm2d] | None:
        """The BatchNorm that reads each block's output, of one of `map_stages`; None where blocks do not begin so."""
        if self._preactivation is None or self._preactivation.behind is None:
            return None
        return self._preactivation.behind(self.stages)[self.map_stages.index(stage)]

    @property
    def has_preactivations(self) -> bool:
        return self._preactivation is not None

    def affine_before_activation(self, stage: int) -> Affine:
        """Weight and bias of the BatchNorm in front of the activation of one of `map_stages`; UsageError without."""
        return self._require_preactivation().affines(self.stages)[self.map_stages.index(stage)]

    def _require_preactivation(self) -> Preactivation:
        if self._preactivation is None:
            raise UsageError(f"{self.name} has no pre-activation features", hint="choose another network or method")
        return self._preactivation

    def run(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Run stages start .. stop-1; `x` is the output of stage start-1 (the images for start 0)."""
        x = x if start else self._normalize_input(x)
        for stage in self.stages[start:stop]:
            x = stage(x)
        return self.head(x) if start <= len(self.stages) < stop else x


def untracked_view(model: StagedModel) -> StagedModel:
    """The same network with shared parameters, whose BatchNorms use batch statistics and track none."""
    view = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    for module in view.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return view


def frozen_view(model: StagedModel) -> StagedModel:
    """The same network in evaluation mode and without gradients, sharing all weights and buffers with `model`."""
    shared: dict[int, Tensor] = {id(buffer): buffer for buffer in model.buffers()}
    shared |= {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    return copy.deepcopy(model, shared).eval()
