"""Gates, redundancy, Grad-CAM and maps: what they say of networks whose answer is known."""

import numpy as np
import pytest
import torch
from torch import nn

from slimconv_lit import create_backbone
from slimconv_lit.analysis.cam import draw_cams, grad_cam, last_map
from slimconv_lit.analysis.gates import draw_gates, gate_activations
from slimconv_lit.analysis.maps import draw_maps, maps_of, tile
from slimconv_lit.analysis.redundancy import (
    ChannelStatistics,
    draw_redundancy,
    measure,
    redundancy,
    redundancy_rows,
    spatial_layers,
)
from slimconv_lit.ops import SlimConv2d


@pytest.fixture(scope="module")
def slim():
    torch.manual_seed(0)
    network = create_backbone("cifar_resnet20", {"class_path": "SlimConv2d", "init_args": {"k": "8/3"}}, 10, 3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias, std=0.2)
    return network.eval()


IMAGES = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 3


def test_gates_are_averaged_over_each_class(slim):
    batches = [(IMAGES[:5], LABELS[:5]), (IMAGES[5:], LABELS[5:])]
    found = gate_activations(slim, batches, num_classes=4)
    operators = {name: m for name, m in slim.named_modules() if isinstance(m, SlimConv2d)}
    assert [gate.name for gate in found] == list(operators)
    seen = {}
    name, operator = list(operators.items())[3]
    hook = operator.gate.register_forward_hook(lambda _, __, w: seen.update(w=w.flatten(1)))
    with torch.no_grad():
        slim(IMAGES)
    hook.remove()
    gate = next(g for g in found if g.name == name)
    for label in range(3):
        torch.testing.assert_close(gate.mean[label].float(), seen["w"][label == LABELS].mean(0))
    assert gate.mean[3].isnan().all(), "no image of that class"
    torch.testing.assert_close(gate.overall.float(), seen["w"].mean(0))
    torch.testing.assert_close(gate.spread.float(), seen["w"].std(0, correction=0), rtol=1e-3, atol=1e-6)
    assert len(draw_gates(found, ["a", "b", "c", "d"]).axes) == 8


def test_gates_of_images_without_labels(slim):
    (first, *_) = gate_activations(slim, [(IMAGES, None)], num_classes=1)
    torch.testing.assert_close(first.mean[0], first.overall)


def test_a_network_without_gates():
    with pytest.raises(ValueError, match="no SlimConv2d; train it with"):
        gate_activations(create_backbone("cifar_resnet20", None, 10), [], 10)


def test_no_images(slim):
    with pytest.raises(ValueError, match="no image"):
        gate_activations(slim, [], 10)
    with pytest.raises(ValueError, match="no image"):
        redundancy(slim, [])


def of(*batches):
    statistics = ChannelStatistics()
    for maps in batches:
        statistics.update(maps)
    return measure(statistics)


def test_copies_are_redundant_and_noise_is_not():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 8, 32, 32, generator=generator)
    copies = noise[:, :1] * torch.tensor([1.0, -2, 3, 1, 1, 1, 1, 0.5]).view(1, -1, 1, 1)
    independent, copied = of(noise), of(copies)
    assert copied.correlation == pytest.approx(1)
    assert copied.effective_rank == pytest.approx(1 / 8)
    assert independent.correlation < 0.03
    assert independent.effective_rank > 0.99
    assert independent.near_empty == copied.near_empty == 0
    faint = noise * torch.tensor([1.0, 1, 1, 1, 1, 1, 0, 1e-4]).view(1, -1, 1, 1)
    assert of(faint).near_empty == 0.25


def test_statistics_do_not_depend_on_the_batches():
    maps = torch.randn(6, 5, 9, 7, generator=torch.Generator().manual_seed(2)).cumsum(1)
    whole, parts = of(maps), of(maps[:1], maps[1:4], maps[4:])
    assert whole.correlation == pytest.approx(parts.correlation, rel=1e-12)
    assert whole.effective_rank == pytest.approx(parts.effective_rank, rel=1e-12)
    # Against numpy on all pixels at once.
    r = np.abs(np.corrcoef(maps.transpose(0, 1).flatten(1).double().numpy()))
    assert whole.correlation == pytest.approx((r.sum() - 5) / 20, rel=1e-9)


@pytest.mark.parametrize("maps", [torch.zeros(1, 3, 4, 4), torch.ones(2, 1, 1, 1)], ids=["zeros", "one pixel"])
def test_constant_maps(maps):
    found = of(maps)
    assert (found.correlation, found.effective_rank) == (0, 0)


def test_redundancy_of_every_spatial_layer(slim):
    layers = redundancy(slim, [IMAGES[:4], IMAGES[4:]])
    assert {layer.name for layer in layers} == set(spatial_layers(slim)) - {"conv1"}
    modules = dict(slim.named_modules())
    for layer in layers:
        assert (layer.after is not None) == isinstance(modules[layer.name], SlimConv2d)
        assert layer.before.channels == modules[layer.name].in_channels
    assert "correlation folded" in redundancy_rows(layers)[0]
    assert len(draw_redundancy(layers).axes) == 3
    plain = create_backbone("cifar_resnet20", None, 10).eval()
    assert all(layer.after is None for layer in redundancy(plain, [IMAGES]))


def test_grad_cam_looks_where_the_evidence_is():
    """A network whose only evidence for class 1 is brightness of the left half, in the map that is looked at."""

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.maps = nn.Conv2d(3, 2, 3, padding=1)
            nn.init.zeros_(self.maps.weight)
            nn.init.zeros_(self.maps.bias)
            with torch.no_grad():
                self.maps.weight[1, :, 1, 1] = 1.0

        def forward(self, x):
            return self.maps(x).relu().mean((2, 3))

    image = torch.zeros(1, 3, 16, 16)
    image[..., :8] = 1
    (heat,) = grad_cam(Left().requires_grad_(False), image, torch.tensor([1]), "maps")
    assert heat.shape == (16, 16)
    assert heat[:, :7].min() > 0.9
    assert heat[:, 9:].max() < 0.1


def test_grad_cam_of_a_backbone(slim):
    assert last_map(slim) == "layer3"
    before = [p.grad for p in slim.parameters()]
    heats = grad_cam(slim, IMAGES[:2])
    assert heats.shape == (2, 32, 32)
    assert 0 <= heats.min() <= heats.max() <= 1
    assert before == [None] * len(before)
    figure = draw_cams((IMAGES[:2] * 50 + 128).clamp(0, 255).byte(), {"plain": heats, "slim": heats}, ["a", "b"])
    assert len(figure.axes) == 6


def test_maps_before_during_and_after_reconstruct(slim):
    name = next(name for name, m in slim.named_modules() if isinstance(m, SlimConv2d))
    found = maps_of(slim, name, IMAGES[:1])
    assert list(found) == ["read", "weighted", "weighted, flipped", "folded, top", "folded, bottom", "written"]
    channels, width = len(found["read"]), len(found["folded, top"])
    folds = channels // width
    torch.testing.assert_close(found["folded, top"], found["weighted"].unflatten(0, (folds, width)).sum(0))
    torch.testing.assert_close(found["folded, bottom"], found["weighted, flipped"].unflatten(0, (folds, width)).sum(0))
    assert len(found["written"]) == slim.get_submodule(name).out_channels
    assert len(draw_maps(found, "title").axes) == 6


def test_tiles():
    picture = tile(torch.arange(3 * 4).reshape(3, 2, 2), columns=2)
    assert picture.shape == (6, 6)
    assert picture[0, 0] == 0
    assert picture[1, 1] == 1
    assert picture[3:, 3:].isnan().all(), "the missing fourth tile"
