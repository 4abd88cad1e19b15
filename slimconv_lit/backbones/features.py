"""A backbone's feature maps in the place of its logits, by one rule for all families (`stages.stage_ends`)."""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torchvision.models.feature_extraction import DualGraphModule, create_feature_extractor

from slimconv_lit.backbones.dilation import DilatedPool2d, PaddedConv2d
from slimconv_lit.ops import operator_classes


class FeatureMaps(nn.Module):
    """Maps images (B, C, H, W) to a list of (B, channels[i], H / strides[i], W / strides[i]), the finest first.

    Args:
        net: The network without its head, from `without_head`. Its parameters have the names that they have in the
            whole network, so `maps.net.load_state_dict(weights, strict=False)` takes a classifier's weights.
        channels: Width of each map.
        strides: Image pixels per pixel of each map.
    """

    def __init__(self, net: nn.Module, channels: list[int], strides: list[int]) -> None:
        super().__init__()
        self.net = net
        self.channels = channels
        self.strides = strides

    def forward(self, x: Tensor) -> list[Tensor]:
        """The feature maps; see the class."""
        return list(self.net(x).values())

    def parameters_before(self, stride: int) -> Iterator[nn.Parameter]:
        """The parameters behind the map of `stride`: of a ResNet's stride 4, those of its stem and first stage."""
        net: Any = self.net
        behind = _behind(_ends(net.train_graph)[self.strides.index(stride)])
        targets = {str(node.target) for node in behind if node.op in ("call_module", "get_attr")}
        for name, parameter in net.named_parameters():
            if name in targets or any(name.startswith(f"{target}.") for target in targets):
                yield parameter

    def cut_at(self, stride: int) -> tuple[nn.Module, nn.Module]:
        """The network in two: images to the map of `stride`, and that map to the last one.

        Layers are shared with this network and keep their names.

        Raises:
            ValueError: If there is no map of `stride` or none after it, or what comes after reads more than that map.
        """
        if stride not in self.strides[:-1]:
            strides = ", ".join(map(str, self.strides))
            raise ValueError(f"no map of stride {stride} with a stage after it; the maps' strides are {strides}")
        net: Any = self.net
        at = self.strides.index(stride)
        ends = [_ends(graph) for graph in (net.train_graph, net.eval_graph)]
        first = [_part(None, end[at]) for end in ends]
        second = [_part(end[at], end[-1]) for end in ends]
        return DualGraphModule(net, *first), DualGraphModule(net, *second)


def _ends(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that make the maps, the finest first."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    maps: Any = output.args[0]
    return list(maps.values())


def _behind(end: fx.Node, start: fx.Node | None = None) -> set[fx.Node]:
    """`end` and all that it is computed from, back to the image or to `start`."""
    found: set[fx.Node] = set()
    pending = [end]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if node is start else node.all_input_nodes
    return found


def _part(start: fx.Node | None, end: fx.Node) -> fx.Graph:
    """The graph that computes `end` from `start`, or from the image."""
    wanted = _behind(end, start)
    part = fx.Graph(tracer_cls=end.graph._tracer_cls)
    copies: dict[fx.Node, fx.Node] = {}
    for node in (node for node in end.graph.nodes if node in wanted):
        if start is not None and node.op == "placeholder":
            raise ValueError(f"what comes after {start.name} does not read that alone")
        copies[node] = part.placeholder("x") if node is start else part.node_copy(node, copies.__getitem__)
    part.output(copies[end])
    return part


def without_head(model: nn.Module, ends: Sequence[str]) -> nn.Module:
    """The part of `model` that makes the outputs of the modules `ends`; it returns them in a dict under these names.

    Raises:
        ValueError: If torch.fx cannot follow the forward pass.
    """
    # Slow to import; only here is it needed by networks that are not timm's.
    import timm.layers

    fx: Any = timm.layers
    leaves = [PaddedConv2d, DilatedPool2d, *operator_classes().values(), *fx.get_notrace_modules()]
    tracer = {"leaf_modules": leaves, "autowrap_functions": fx.get_notrace_functions()}
    try:
        return create_feature_extractor(model, list(ends), tracer_kwargs=tracer, suppress_diff_warning=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"features_only: the forward pass cannot be followed: {reason}") from error
