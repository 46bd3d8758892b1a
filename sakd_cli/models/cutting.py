"""Cut a classifier of somebody else's into stages without rewriting it.

The network is traced with torch.fx, its blocks whole: only what holds blocks one after another, most of the weights or
the classifier is looked into. Where a single tensor is alive, a map, the network can be cut. The last such place of
each size ends a stage; the pieces keep the modules, and the names they have in their network. A cut is never believed:
the pieces one after another are compared with the plain forward, bit for bit.
"""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from math import gcd, isqrt
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sakd_cli.config.preprocessing import ImageSize, height_width, size_text
from sakd_cli.errors import UsageError, first_line
from sakd_cli.models.staged import Layout, StagedModel, StageInfo

SPLIT = 4  # stages of blocks of one size, where that is all there is (ViT)
PATCH = 4  # a network that begins so much smaller than its images has blocks of that size: its stem ends before them
SMALLER = 1.5  # a map so much smaller begins a stage; convolutions without padding take off a pixel or two as well
POOLS = ("AdaptiveAvgPool", "AdaptiveMaxPool", "AdaptivePool", "GlobalPool", "GlobalAvgPool", "AdaptiveCatAvgMaxPool")
MEANS = ("mean", "adaptive_avg_pool2d", "adaptive_max_pool2d")
MOST_PREFIX = 16  # tokens of no place; more are an axis that is misread


class CannotCutError(Exception):
    """Why a network cannot be cut, in one line."""


class CutPoint(NamedTuple):
    """Where the network can be cut, behind a node: what is alive there, its shape (C, H, W), the weights before it."""

    node: fx.Node
    shape: tuple[int, int, int]
    layout: Layout
    weights: int


class _Tracer(fx.Tracer):
    """Looks into the modules of these names, and into no others."""

    def __init__(self, opened: set[str]) -> None:
        super().__init__(param_shapes_constant=True)
        self.opened = opened

    def create_proxy(self, kind: str, target: Any, args: tuple[Any, ...], *rest: Any, **more: Any) -> Any:
        if kind == "placeholder" and args:  # a further argument of `forward`: what stands for it when it is not given
            return args[0]
        return super().create_proxy(kind, target, args, *rest, **more)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name not in self.opened


class _Recorder(fx.Interpreter):
    """Runs a graph, and keeps what its nodes give as its `env`."""

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return tuple(map(_plain, args)), {key: _plain(value) for key, value in kwargs.items()}


def _plain(value: Any) -> Any:
    """A module may change the lists it is given; those of a graph cannot be changed."""
    return [_plain(one) for one in value] if isinstance(value, list) else value


def cut(network: nn.Module, name: str, family: str, num_classes: int, side: ImageSize) -> StagedModel:
    """The network as a StagedModel for images of `side` pixels, sharing its modules. UsageError where that fails."""
    training = network.training
    probe = torch.rand(2, 3, *height_width(side), generator=torch.Generator().manual_seed(0)) * 4 - 2
    try:
        with torch.no_grad():
            for module in network.modules():
                if isinstance(getattr(module, "inplace", None), bool):  # what a spot sees must stay
                    module.inplace = False  # type: ignore[assignment]
            plain = network.eval()(probe)
            model = _assembled(network, name, family, num_classes, probe)
            _check(model.eval(), probe, plain)
    except CannotCutError as error:
        raise UsageError(f"{name}: cannot be cut into stages: {error}") from None
    except Exception as error:  # whatever a network of somebody else's raises
        raise UsageError(f"{name}: fails on images of {size_text(side)} pixels ({first_line(error)})") from None
    return model.train(training)


def _assembled(network: nn.Module, name: str, family: str, num_classes: int, probe: Tensor) -> StagedModel:
    graph = _traced(network, num_classes)
    head, pooled = _head(network, graph, num_classes)
    recorder = _Recorder(fx.GraphModule(network, graph), garbage_collect_values=False)
    recorder.run(probe)
    values = recorder.env
    if values[pooled].ndim != 2:
        raise CannotCutError("its last linear layer gets more than one vector per image")
    places = _chosen(list(_places(network, graph, values, probe.shape[2:])), probe.shape[2])
    if len(places) < 2:
        raise CannotCutError("no two places were found where a single map is alive")
    stages: list[tuple[StageInfo, nn.Module]] = []
    before: fx.Node | None = None
    for number, place in enumerate(places):
        c, h, w = place.shape
        signed = bool((values[place.node] < 0).any())
        part, stride = f"stage{number}" if number else "stem", max(1, round(probe.shape[2] / h))
        info = StageInfo(part, c, stride, signed=signed, size=(h, w), layout=place.layout)
        stages.append((info, _piece(network, graph, before, place.node)))
        before = place.node
    stages.append((StageInfo("pool", values[pooled].shape[1], 0), _piece(network, graph, before, pooled)))
    linear = cast(nn.Linear, network.get_submodule(head))
    return StagedModel(name, family, stages, num_classes, None, head=linear, head_name=head)


def _check(model: StagedModel, probe: Tensor, plain: Tensor) -> None:
    """Raise CannotCutError unless the pieces give the same bits and leave each other's values alone."""
    x = probe
    for stage in [*model.stages, model.head]:
        given = x.clone()
        y = stage(x)
        if not torch.equal(given, x):
            raise CannotCutError("a piece writes over what the one before gave")
        x = y
    if x.shape != plain.shape or not torch.equal(x, plain):
        raise CannotCutError("its pieces one after another do not give the bits of the whole")


def _traced(network: nn.Module, num_classes: int) -> fx.Graph:
    """The graph with as many containers opened as can be, the same in training and evaluation mode."""
    opened: set[str] = set()
    graph = _graph(network, opened)
    refused: set[str] = set()
    total = max(1, sum(p.numel() for p in network.parameters()))
    while True:
        inside = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        worth = [n for n in inside if n not in refused and _worth_opening(network.get_submodule(n), total, num_classes)]
        if not worth:
            return graph
        for target in worth:
            try:
                graph = _graph(network, opened | {target})
                opened.add(target)
            except CannotCutError:
                refused.add(target)


def _graph(network: nn.Module, opened: set[str]) -> fx.Graph:
    """The network's graph. Raises CannotCutError where it has none that holds for training too."""
    training = network.training
    try:
        with warnings.catch_warnings(action="ignore"):
            graphs = [_Tracer(opened).trace(network.train(mode)) for mode in (True, False)]
    except Exception as error:  # whatever a network of somebody else's raises when it is traced
        raise CannotCutError(f"torch.fx cannot trace it ({first_line(error)})") from None
    finally:
        network.train(training)
    for graph in graphs:
        _dropouts_as_modules(network, graph)
    if str(graphs[0]) != str(graphs[1]):
        raise CannotCutError("it computes in another way while it is trained")
    return graphs[1]


def _dropouts_as_modules(network: nn.Module, graph: fx.Graph) -> None:
    """A dropout function gets the mode as an argument when it is traced; a dropout module has it."""
    found = [node for node in graph.nodes if node.op == "call_function" and node.target is F.dropout]
    for number, node in enumerate(found):
        p = node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5)
        name = f"sakd_dropout{number}"
        network.add_module(name, nn.Dropout(p).train(network.training))
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, (node.args[0] if node.args else node.kwargs["input"],)))
        graph.erase_node(node)


def _worth_opening(module: nn.Module, total: int, num_classes: int) -> bool:
    children = list(module.children())
    if not children or (type(module).__module__.startswith("torch.nn.modules.") and not _plain_sequence(module)):
        return False
    if _plain_sequence(module) or sum(p.numel() for p in module.parameters()) > total / 2:
        return True
    return any(isinstance(child, nn.Linear) and child.out_features == num_classes for child in module.modules())


def _plain_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _head(network: nn.Module, graph: fx.Graph, num_classes: int) -> tuple[str, fx.Node]:
    """Name of the last linear layer, which gives the logits, and the node of what it gets."""
    node = next(node for node in graph.nodes if node.op == "output").args[0]
    while isinstance(node, fx.Node) and node.op == "call_module":
        module = network.get_submodule(str(node.target))
        if isinstance(module, nn.Linear):
            if module.out_features != num_classes:
                raise CannotCutError(f"its last linear layer has {module.out_features} outputs, not {num_classes}")
            if not isinstance(node.args[0], fx.Node):
                break
            return str(node.target), node.args[0]
        if not isinstance(module, nn.Identity):
            break
        node = node.args[0]
    raise CannotCutError("its logits are not what one linear layer gives")


def _places(
    network: nn.Module, graph: fx.Graph, values: dict[fx.Node, Any], image: tuple[int, ...]
) -> Iterator[CutPoint]:
    """Every place in front of the pooling where nothing but one map is alive, in order; image: height and width."""
    fixed = _fixed(graph)
    order = {node: place for place, node in enumerate(graph.nodes)}
    last = {node: max((order[user] for user in node.users), default=-1) for node in graph.nodes}
    open_until = _spans(network, graph, order)
    grid: tuple[int, int] | None = None
    layout, weights, alive_until, seen = "planes", 0, -1, set[str]()
    live: list[fx.Node] = []
    for node in graph.nodes:
        if node.op == "output" or _pools(network, node):
            return
        if node.op == "call_module" and str(node.target) not in seen:
            seen.add(str(node.target))
            weights += sum(p.numel() for p in network.get_submodule(str(node.target)).parameters())
        live = [other for other in live if last[other] > order[node]]
        if node not in fixed and last[node] > order[node]:
            live.append(node)
        value = values[node]
        alive_until = max(alive_until, open_until.get(node, -1))
        if node.op == "placeholder" or node in fixed or not isinstance(value, Tensor):
            continue
        if (found := _read(value, grid, layout, image)) is None:
            continue
        shape, form = found
        if value.ndim == 4:
            grid, layout = shape[1:], form.form
        if live == [node] and alive_until <= order[node] and weights:
            yield CutPoint(node, shape, form, weights)


def _fixed(graph: fx.Graph) -> list[fx.Node]:
    """What does not depend on the images, in order: weights and what is made of them. Every piece has its own."""
    found: dict[fx.Node, None] = {}
    for node in graph.nodes:
        if node.op not in ("placeholder", "output") and all(other in found for other in node.all_input_nodes):
            found[node] = None
    return list(found)


def _spans(network: nn.Module, graph: fx.Graph, order: dict[fx.Node, int]) -> dict[fx.Node, int]:
    """For the first use of weights: where they are used last. No cut may lie between, or a tensor had two names."""
    uses: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module" and list(network.get_submodule(str(node.target)).parameters()):
            uses.setdefault(str(node.target), []).append(node)
        elif node.op == "get_attr":
            uses.setdefault(str(node.target), []).extend(sorted(node.users, key=lambda user: order[user]))
    return {nodes[0]: max(order[node] for node in nodes) for nodes in uses.values() if nodes}


def _pools(network: nn.Module, node: fx.Node) -> bool:
    """Whether the map ends here in one vector."""
    if node.op == "call_module":
        kind = type(network.get_submodule(str(node.target))).__name__
        return any(name in kind for name in POOLS)
    called = getattr(node.target, "__name__", str(node.target))
    return node.op in ("call_function", "call_method") and called in MEANS


def _read(
    value: Tensor, grid: tuple[int, int] | None, last: str, image: tuple[int, ...]
) -> tuple[tuple[int, int, int], Layout] | None:
    """Shape (C, H, W) and layout of a value; None where it is no map. `grid`, `last`: of the maps before it."""
    if value.ndim == 4:
        _, a, b, c = value.shape
        planes, pixels = _shaped_as(b, c, image), _shaped_as(a, b, image)
        if pixels and (not planes or last == "pixels"):
            return (c, a, b), Layout("pixels")
        return ((a, b, c), Layout("planes")) if planes else None
    if value.ndim == 3:
        tokens, width = value.shape[1:]
        high, wide = (side // gcd(*image) for side in image)
        times = isqrt(tokens // (high * wide))
        alike = times * high, times * wide
        patched = ((image[0] // p, image[1] // p) for p in range(1, min(image) + 1))  # what is left over is cut off
        for h, w in (alike if grid is None else grid, alike, *patched):
            if 0 <= tokens - h * w <= MOST_PREFIX and h * w:
                return (width, h, w), Layout("tokens", tokens - h * w)
    return None


def _shaped_as(high: int, wide: int, image: tuple[int, ...]) -> bool:
    """Whether both sides are those of the image, divided by the same number and rounded up or down."""
    height, width = image
    return high == wide if height == width else abs(high * width - wide * height) <= max(image)


def _chosen(places: list[CutPoint], high: int) -> list[CutPoint]:
    """Stem and ends of stages: the last place of each size, falling; equal parts where there is one size only."""
    groups: list[list[CutPoint]] = []
    for place in places:
        height = place.shape[1]
        if groups and height > groups[-1][-1].shape[1]:
            break
        if not groups or SMALLER * height <= groups[-1][0].shape[1]:
            groups.append([])
        groups[-1].append(place)
    groups = [group for k, group in enumerate(groups) if not k or group[-1].weights > groups[k - 1][-1].weights]
    if not groups:
        return []
    stem, ends = _blocks(groups[0])
    if len(groups) == 1:
        count = min(SPLIT, len(ends))
        return [stem, *(ends[len(ends) * (part + 1) // count - 1] for part in range(count))]
    patched = PATCH * groups[0][0].shape[1] <= high and bool(ends)
    return [*[stem] * patched, *(group[-1] for group in groups)]


def _blocks(group: list[CutPoint]) -> tuple[CutPoint, list[CutPoint]]:
    """Of places of one size: the last in front of the first block, and the end of each block."""
    steps = [after.weights - before.weights for before, after in pairwise(group)]
    some = sorted(step for step in steps if step)
    heavy = [k for k, step in enumerate(steps) if some and step > some[len(some) // 2] / 2]
    return group[heavy[0] if heavy else 0], [group[k + 1] for k in heavy]


def _piece(network: nn.Module, graph: fx.Graph, start: fx.Node | None, stop: fx.Node) -> fx.GraphModule:
    """The part of the graph behind `start` (None: from the images) up to `stop`, as a module with the same names."""
    nodes, fixed = list(graph.nodes), _fixed(graph)
    behind = 0 if start is None else nodes.index(start) + 1
    needed = set(nodes[behind : nodes.index(stop) + 1]) - set(fixed)
    for node in reversed(nodes):
        if node in needed and node is not start:
            needed.update(node.all_input_nodes)
    piece = fx.Graph()
    copies = {} if start is None else {start: piece.placeholder("x")}
    for node in nodes if start is None else [*fixed, *nodes]:
        if node in needed and node not in copies:
            copies[node] = piece.node_copy(node, copies.__getitem__)
    piece.output(copies[stop])
    module, saved = fx.GraphModule(network, piece), network.state_dict().keys()
    for key, buffer in list(module.named_buffers(remove_duplicate=False)):
        if key not in saved:  # what is not saved in its network: torch.fx before 2.14 forgets that
            owner, _, field = key.rpartition(".")
            module.get_submodule(owner).register_buffer(field, buffer, persistent=False)
    return module
