"""Substitution on networks small enough to see through; whole families are in test_families.py."""

import copy
import functools

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from slimconv_lit import SlimConv2d, fuse, prune, slimify, substitute
from slimconv_lit.ops import CompactConv2d, GhostConv2d, SCConv2d


class Bottleneck(nn.Module):
    """1x1, 3x3, gate, 1x1, and a way around."""

    def __init__(self, channels=64, width=32, stride=1, groups=1, dilation=1, gated=False, act=nn.ReLU):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.fc1 = nn.Conv2d(width, 8, 1) if gated else None
        self.fc2 = nn.Conv2d(8, width, 1) if gated else None
        self.conv3 = nn.Conv2d(width, channels, 1, bias=True)
        self.act = act()
        self.stride = stride

    def forward(self, x):
        y = self.act(self.bn1(self.conv1(x)))
        y = self.act(self.bn2(self.conv2(y)))
        if self.fc1 is not None:
            y = torch.sigmoid(self.fc2(self.act(self.fc1(y.mean((2, 3), keepdim=True))))) * y
        return self.conv3(y) + x[:, :, :: self.stride, :: self.stride]


class Net(nn.Module):
    def __init__(self, *blocks, channels=64, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, classes)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def snapshot(model):
    return {n: (type(m), m.extra_repr()) for n, m in model.named_modules()}, copy.deepcopy(model.state_dict())


def same(model, before):
    modules, state = before
    now = model.state_dict()
    return (
        {n: (type(m), m.extra_repr()) for n, m in model.named_modules()} == modules
        and list(now) == list(state)
        and all(torch.equal(now[key], state[key]) for key in state)
    )


def trains(model, x=None):
    model.train()
    x = torch.randn(2, 3, 16, 16) if x is None else x
    out = model(x)
    out.square().mean().backward()
    # A branch whose input is zero everywhere has a gradient of zero; every parameter has one at all.
    return all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("gated", [False, True])
def test_replaces_the_3x3_and_narrows_its_readers_and_gate(gated):
    model = Net(Bottleneck(gated=gated))
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    report = slimify(model, k=4 / 3)
    block = model.blocks[0]
    assert report.replaced == ["blocks.0.conv2"]
    assert isinstance(block.conv2, SlimConv2d)
    assert isinstance(block.bn2, nn.Identity)
    assert block.conv3.in_channels == block.conv3.weight.shape[1] == 24
    if gated:
        assert (block.fc1.in_channels, block.fc2.out_channels) == (24, 24)
        assert block.fc2.weight.shape[0] == block.fc2.bias.shape[0] == 24
    assert trains(model)
    changed = {k for k, v in model.state_dict().items() if k not in kept or not torch.equal(v, kept[k])}
    narrowed = {"blocks.0.conv3.weight", "blocks.0.fc1.weight", "blocks.0.fc2.weight", "blocks.0.fc2.bias"}
    running = {k for k in changed if "running" in k or "tracked" in k}
    assert {k for k in changed if ".conv2." not in k} - running <= narrowed


def test_the_report_prints_a_table_with_every_spatial_convolution():
    model = Net(Bottleneck(), Bottleneck(groups=32, stride=2))
    was = sum(p.numel() for p in model.parameters())
    report = slimify(model)
    now = sum(p.numel() for p in model.parameters())
    text = str(report)
    for words in ("stem", "Conv2d 3->64 3x3", "fewer than min_channels=32", "blocks.1.conv2", "depthwise",
                  "SlimConv2d 32->24", "narrowed blocks.1.conv3"):  # fmt: skip
        assert words in text
    assert text.endswith(f"\n2 of 3 spatial convolutions replaced; params {was:,} -> {now:,} ({now / was:.3f})")
    assert list(report.left) == ["stem"]


def test_a_network_that_becomes_larger_is_told():
    report = slimify(torchvision.models.mobilenet_v2(num_classes=10))
    before, now = report.params
    assert now > before
    assert str(report).endswith("\nit is larger than before: depthwise convolutions have little to save")


def test_stride_dilation_groups_kernel_and_padding_carry_over():
    model = Net(Bottleneck(stride=2, dilation=2, groups=4))
    model.blocks.append(Bottleneck())
    model.blocks[1].conv2 = nn.Conv2d(32, 32, (1, 5), padding=(0, 2))
    slimify(model)
    first, second = model.blocks[0].conv2.top[0], model.blocks[1].conv2.top[0]
    assert (first.stride, first.dilation, first.padding, first.groups) == ((2, 2), (2, 2), (2, 2), 4)
    assert (second.kernel_size, second.padding) == ((1, 5), (0, 2))


def test_padding_of_its_own_carries_over():
    class Valid(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(32, 64, 3, padding="valid"), nn.ReLU(), nn.Conv2d(64, 8, 1))

        def forward(self, x):
            return self.net(x)

    model = Valid()
    x = torch.randn(2, 32, 9, 9)
    shape = model(x).shape
    assert slimify(model, example_input=x).replaced == ["net.0"]
    assert model(x).shape == shape


def test_device_dtype_memory_format_and_mode_carry_over():
    model = Net(Bottleneck()).double().to(memory_format=torch.channels_last).eval()
    slimify(model)
    operator = model.blocks[0].conv2
    assert {p.dtype for p in operator.parameters()} == {torch.float64}
    assert operator.top[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not operator.training
    assert not operator.gate.norm.training
    with torch.device("meta"):
        shadow = Net(Bottleneck())
    slimify(shadow)
    assert {p.device.type for p in shadow.parameters()} == {"meta"}


def test_never_two_in_a_row():
    def plain(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())

    model = nn.Sequential(plain(3, 64), plain(64, 64), plain(64, 128), plain(128, 128), plain(128, 128))
    model.append(nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(512, 10)))
    report = slimify(model)
    assert report.replaced == ["1.0", "3.0"]
    assert "restores the width" in report.left["2.0"]
    assert (model[2][0].in_channels, model[2][0].out_channels) == (48, 128)
    assert trains(model)
    again = slimify(model)
    assert again.replaced == []
    assert again.left["4.0"] == "reads 3.0, which is slimmed, and restores the width"
    assert "\n0 of 3 spatial convolutions replaced; 2 operators were there already; params 235,734" in str(again)


def test_a_linear_layer_behind_a_flattened_map_is_narrowed_position_by_position():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(1), nn.Linear(128, 5))
    before = model[4].weight.detach().clone()
    assert slimify(model, example_input=torch.randn(2, 32, 4, 4)).replaced == ["0"]
    assert model[4].in_features == 24 * 4
    assert torch.equal(model[4].weight, before[:, : 24 * 4])


def test_norms_behind_an_activation_are_narrowed_and_start_anew():
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1))
    nn.init.constant_(model[2].weight, 7.0)
    slimify(model, example_input=torch.randn(2, 32, 8, 8))
    assert model[2].num_features == 24
    assert torch.equal(model[2].weight, torch.ones(24))
    assert model[2].running_mean.shape == (24,)
    assert trains(model, torch.randn(2, 32, 8, 8))


def test_a_second_call_changes_nothing():
    model = Net(Bottleneck(), Bottleneck(gated=True))
    slimify(model)
    before = snapshot(model)
    assert slimify(model).replaced == []
    assert same(model, before)


def test_include_and_exclude_are_name_patterns():
    model = Net(*(Bottleneck() for _ in range(3)))
    report = slimify(model, include=["blocks.[01].*"], exclude="*.1.conv2")
    assert report.replaced == ["blocks.0.conv2"]
    assert report.left["blocks.1.conv2"] == "excluded by '*.1.conv2'"
    assert report.left["blocks.2.conv2"] == "not named by include"
    with pytest.raises(ValueError, match=r"include='block\..*' matches no spatial convolution"):
        slimify(model, include="block.*.conv2")


def test_1x1_convolutions_are_taken_on_request():
    model = Net(Bottleneck(), Bottleneck(gated=True))
    assert substitute(model, GhostConv2d, include="*.conv?").replaced == ["blocks.0.conv2", "blocks.1.conv2"]
    report = substitute(model, GhostConv2d, exclude="*.fc?", pointwise=True)
    assert report.replaced == [f"blocks.{i}.conv{j}" for i in range(2) for j in (1, 3)]
    assert report.left["blocks.1.fc1"] == "excluded by '*.fc?'"
    assert isinstance(model.blocks[0].conv1, GhostConv2d)
    assert isinstance(model.blocks[0].bn1, nn.Identity)
    assert trains(model)


def test_a_slim_1x1_narrows_its_readers_too():
    model = Net(Bottleneck(channels=32, width=64), channels=32)
    assert slimify(model, exclude="*.conv2").replaced == []
    assert substitute(model, SlimConv2d, include="*.conv1", pointwise=True).replaced == ["blocks.0.conv1"]
    assert model.blocks[0].conv2.in_channels == 24
    assert trains(model)


def test_the_trial_finds_norms_of_another_width():
    """It does not go through their arithmetic, but it checks what they read."""

    class Careless(SlimConv2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.top[1] = nn.BatchNorm2d(self.top[1].num_features + 1)

    report = substitute(Net(Bottleneck()), Careless)
    assert "a norm of 17 channels reads a map of shape (2, 16, " in report.left["blocks.0.conv2"]


def test_an_operator_by_class_partial_name_or_plain_values():
    for operator in (
        SlimConv2d, functools.partial(SlimConv2d, k="4/3"), "SlimConv2d",
        {"class_path": "slimconv_lit.ops.SlimConv2d", "init_args": {"k": "4/3"}},
    ):  # fmt: skip
        assert substitute(Net(Bottleneck()), operator).replaced == ["blocks.0.conv2"]
    with pytest.raises(ValueError, match="did you mean 'SlimConv2d'"):
        substitute(Net(Bottleneck()), "SlimConv")


def test_arguments_that_fit_no_convolution_raise_and_change_nothing():
    model = Net(Bottleneck())
    before = snapshot(model)
    for mistake, answer in (
        ({"k": 1.5}, r"k=1\.5.*4/3"),
        ({"k": None}, "k=None is neither a number nor a fraction"),
        ({"arangement": "none"}, r"slimify takes no arangement='none'; did you mean 'arrangement'\?"),
        ({"min_chanels": 8}, r"slimify takes no min_chanels=8; did you mean 'min_channels'"),
        ({"in_channels": 8}, "slimify takes no in_channels=8; "),
    ):
        with pytest.raises((ValueError, TypeError), match=answer):
            slimify(model, **mistake)
    for operator, answer in (
        (functools.partial(SlimConv2d, kk=2), r"SlimConv2d takes no kk=2; did you mean 'k'\?"),
        ({"class_path": "GhostConv2d", "init_args": {"ss": 3}}, r"GhostConv2d takes no ss=3; did you mean 's'\?"),
        (GhostConv2d(8, 8), r"operator=GhostConv2d\( is neither an operator class"),
    ):
        with pytest.raises(TypeError, match=answer):
            substitute(model, operator)
    assert same(model, before)


@pytest.mark.parametrize("rewrite", [slimify, lambda model: prune(model, 0.5), fuse])
def test_what_is_no_network(rewrite):
    with pytest.raises(TypeError, match=r"model='resnet18' is not a network .*; create_backbone\(name\) or "):
        rewrite("resnet18")
    with pytest.raises(TypeError, match="call it first, and hand over what it returns"):
        rewrite(Net)


class Returns(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a = nn.Conv2d(32, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 32, 1)
        self.scale = nn.Parameter(torch.ones(32, 1, 1))
        self.slim = nn.Conv2d(16, 32, 1)
        self.wide = nn.Conv2d(64, 32, 1)
        self.depthwise = nn.Conv2d(32, 32, 1, groups=32)
        self.f = forward

    def forward(self, x):
        return self.f(self, x)


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (lambda m, x: m.b(m.a(x) + x), "with values of its own for each channel"),
        (lambda m, x: m.b(m.a(x)) + m.a(x), "is used more than once"),
        (lambda m, x: (m.b(m.a(x)), m.b(x)), "is read by b, which runs more than once"),
        (lambda m, x: (lambda y: (m.b(y), y))(m.a(x)), "the network returns what it writes"),
        (lambda m, x: m.b(functional.relu(m.a(x)) * m.scale), "with values of its own for each channel"),
        (lambda m, x: m.wide(torch.cat([m.a(x), m.b(x)], 1)), "is concatenated with what b writes before wide reads"),
        (lambda m, x: m.slim(m.a(x)[:, :16]), "is split or reordered before slim reads it"),
        (lambda m, x: m.slim(m.a(x).chunk(2, 1)[1]), "is split or reordered before slim reads it"),
        (lambda m, x: m.b(m.a(x).flip(1)), "is split or reordered before b reads it"),
        (lambda m, x: m.b(m.a(x).view(-1, 2, 16, 8, 8).transpose(1, 2).reshape(-1, 32, 8, 8)), "split or reordered"),
        (lambda m, x: m.b(torch.softmax(m.a(x), 1)), "goes into _softmax"),
        (lambda m, x: m.b(m.a(x) * m.a(x).mean(1, keepdim=True)), "is used more than once"),
        (lambda m, x: (lambda y: m.b(y - y.mean(1, keepdim=True)))(m.a(x)), "goes into mean"),
        (lambda m, x: m.depthwise(m.a(x)), "read by depthwise, which cannot be narrowed: 24 channels do not divide"),
        (lambda m, x: m.b(m.a(x) + m.b(x)), "which runs more than once"),
        (lambda m, x: m.b(x), "never ran in the traced forward pass"),
        (lambda m, x: m.a(x).mean((1, 2, 3)), "goes into mean"),
        (lambda m, x: {"deep": [m.a(x)]}, "the network returns what it writes"),
    ],
)  # fmt: skip
def test_what_is_not_private_is_left_alone_with_the_reason(forward, why):
    model = Returns(forward)
    before = snapshot(model)
    report = slimify(model, include="a", example_input=torch.randn(2, 32, 8, 8))
    assert why in report.left["a"]
    assert same(model, before)


@pytest.mark.parametrize(
    ("forward", "readers"),
    [
        (lambda m, x: m.b(functional.max_pool2d(functional.hardswish(m.a(x)), 2)), ["b"]),
        (lambda m, x: m.b(functional.interpolate(m.a(x), scale_factor=2)), ["b"]),
        (lambda m, x: m.b(functional.pad(functional.dropout(m.a(x), training=m.training), (1, 1))), ["b"]),
        (lambda m, x: m.b(m.a(x) * 0.5 + 1), ["b"]),
        (lambda m, x: (lambda y: m.b(y) + m.slim.weight.sum() * m.b.weight.mean())(m.a(x)), ["b"]),
        (lambda m, x: (lambda y: m.b(y.clone().clamp_(0, 6)))(m.a(x).contiguous()), ["b"]),
        (lambda m, x: m.b(m.a(x).flatten(2).unflatten(2, (8, 8))), ["b"]),
        (lambda m, x: m.b(m.a(x).permute(0, 2, 3, 1).relu().permute(0, 3, 1, 2)), ["b"]),
        (lambda m, x: m.b(m.a(x) * torch.rand(x.shape[0], 1, 1, 1, device=x.device)), ["b"]),
    ],
)
def test_what_only_passes_channels_on_keeps_a_space_private(forward, readers):
    model = Returns(forward)
    x = torch.randn(2, 32, 8, 8)
    shape = model(x).shape
    report = slimify(model, include="a", example_input=x)
    assert report.replaced == ["a"], report
    assert report.rows[0].why == f"narrowed {', '.join(readers)}"
    assert model(x).shape == shape


def test_a_reader_that_runs_only_in_training_is_narrowed_too():
    class Auxiliary(Returns):
        def forward(self, x):
            y = self.a(x)
            return (self.b(y), self.wide(torch.cat([y, y], 1))) if self.training else self.b(y)

    model = Auxiliary(None)
    report = slimify(model, include="a", example_input=torch.randn(2, 32, 8, 8))
    assert "before wide reads it" in report.left["a"]


def test_a_product_that_is_no_gate_is_left_alone():
    class Product(Returns):
        def forward(self, x):
            gate = self.b(x)
            return self.wide(torch.cat([self.a(x) * gate, gate], 1))

    report = slimify(Product(None), include="a", example_input=torch.randn(2, 32, 8, 8))
    assert "is multiplied by what b writes" in report.left["a"] or "concatenated" in report.left["a"]


def test_hooks_and_computed_weights_are_respected():
    model = Net(Bottleneck(), Bottleneck(), Bottleneck())
    model.blocks[0].conv2.register_forward_hook(lambda *_: None)
    nn.utils.parametrizations.weight_norm(model.blocks[1].conv2)
    model.blocks[2].conv2.padding_mode = "circular"
    report = slimify(model)
    assert "hooks" in report.left["blocks.0.conv2"]
    assert "Parametrized" in report.left["blocks.1.conv2"] or "computed" in report.left["blocks.1.conv2"]
    assert "circular" in report.left["blocks.2.conv2"]


def test_shared_layers_are_left_alone():
    shared = Bottleneck()
    model = Net(shared, shared, Bottleneck())
    twin = Bottleneck()
    twin.conv2.weight = model.blocks[2].conv2.weight
    model.blocks.append(twin)
    report = slimify(model)
    assert report.replaced == []
    assert "is used more than once" in report.left["blocks.0.conv2"]
    assert "is used more than once" in report.left["blocks.3.conv2"]


def test_what_cannot_be_traced_is_left_with_the_reason():
    class Stubborn(Net):
        def forward(self, x):
            return super().forward(x) if x.sum().item() > 0 else super().forward(-x)

    model = Stubborn(Bottleneck())
    before = snapshot(model)
    with pytest.warns(UserWarning, match="nothing was replaced: the network could not be traced") as told:
        report = slimify(model)
    assert told[0].filename == __file__
    assert report.replaced == []
    assert all("could not be traced" in why for why in report.left.values())
    assert same(model, before)


def test_a_failure_midway_takes_everything_back():
    class Fragile(SlimConv2d):
        built = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.top[0].weight.device.type != "meta":
                Fragile.built += 1
                if Fragile.built == 3:
                    raise RuntimeError("out of memory")

    model = Net(*(Bottleneck(gated=True) for _ in range(4)))
    before = snapshot(model)
    modules = dict(model.named_modules())
    with pytest.raises(RuntimeError, match="out of memory"):
        substitute(model, Fragile)
    assert Fragile.built == 3
    assert same(model, before)
    assert dict(model.named_modules()) == modules


def test_forward_that_depends_on_a_width_is_found_out_before_anything_is_done():
    class Fixed(Net):
        def forward(self, x):
            y = self.blocks[0].conv1(self.stem(x))
            y = self.blocks[0].conv2(y)
            assert y.shape[1] == 32
            return self.head(self.blocks[1](self.blocks[0].conv3(y)).mean((2, 3)))

    model = Fixed(Bottleneck(), Bottleneck())
    report = slimify(model)
    assert "does not run with it replaced" in report.left["blocks.0.conv2"]
    assert report.replaced == ["blocks.1.conv2"]


def test_tracing_leaves_random_state_and_network_alone():
    model = Net(Bottleneck(), Bottleneck(act=nn.Hardswish)).train()
    before = snapshot(model)
    torch.manual_seed(0)
    slimify(model, include="stem")
    assert same(model, before)
    assert torch.equal(torch.rand(3), torch.manual_seed(0) and torch.rand(3))


def test_inputs_of_any_form():
    class Two(Net):
        def forward(self, image, *, mask):
            return super().forward(image * mask)

    x, mask = torch.randn(2, 3, 12, 12), torch.ones(2, 1, 12, 12)
    assert slimify(Two(Bottleneck()), example_input={"image": x, "mask": mask}).replaced == ["blocks.0.conv2"]
    assert slimify(Net(Bottleneck()), example_input=(x,)).replaced == ["blocks.0.conv2"]
    small = nn.Sequential(Net(Bottleneck()).stem, Bottleneck(), nn.Flatten(), nn.Linear(64 * 28 * 28, 10))
    assert slimify(small).replaced == ["1.conv2"]


def plain(reads, writes, groups=1, norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(reads, writes, 3, padding=1, groups=groups), norm(writes), nn.ReLU())


def test_a_narrowed_reader_is_not_replaced_too():
    model = nn.Sequential(plain(3, 64), plain(64, 64, groups=64), plain(64, 64), nn.Conv2d(64, 5, 1))
    report = substitute(model, CompactConv2d)
    assert report.replaced == ["1.0"], report
    assert report.left["2.0"] == "reads 1.0, which is slimmed, and restores the width"
    assert trains(model)


@pytest.mark.parametrize("gate_first", [False, True])
def test_what_writes_the_gate_of_a_slimmed_space_is_not_replaced_too(gate_first):
    class Gated(Returns):
        def forward(self, x):
            gate = self.gate(x) if gate_first else None
            y = self.a(x)
            return self.b(y * (self.gate(x) if gate is None else gate))

    def narrow_3x3(reads, writes, kernel, *more):
        return GhostConv2d(reads, 24 if kernel == 3 else writes, kernel, *more)

    model = Gated(None)
    model.gate = nn.Conv2d(32, 32, 1)
    report = substitute(model, narrow_3x3, "[ag]*", pointwise=True, example_input=torch.randn(2, 32, 8, 8))
    first, other = ("gate", "a") if gate_first else ("a", "gate")
    assert report.replaced == [first], report
    told = "is multiplied by what gate writes, which" if gate_first else "writes the gate of a, which is slimmed"
    assert told in report.left[other]


def test_one_that_does_not_run_with_the_others_is_left_alone():
    class AtMostTwo(Net):
        def forward(self, x):
            assert sum(isinstance(block.conv2, SlimConv2d) for block in self.blocks) < 3
            return super().forward(x)

    model = AtMostTwo(*(Bottleneck() for _ in range(4)))
    report = slimify(model)
    assert report.replaced == ["blocks.0.conv2", "blocks.1.conv2"]
    assert "the network does not run with it replaced: AssertionError" in report.left["blocks.3.conv2"]
    assert trains(model)


def test_a_norm_behind_an_activation_is_taken_back_with_its_count():
    class Fragile(SlimConv2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if self.in_channels == 48 and not self.top[0].weight.is_meta:
                raise RuntimeError("out of memory")

    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32), nn.Conv2d(32, 48, 1))
    model.extend([nn.Conv2d(48, 48, 3, padding=1), nn.Conv2d(48, 5, 1)])
    model(torch.randn(2, 32, 8, 8))
    before = snapshot(model)
    with pytest.raises(RuntimeError, match="out of memory"):
        substitute(model, Fragile)
    assert model[2].num_batches_tracked == 1
    assert same(model, before)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_full_backward_pre_hook"])
@pytest.mark.parametrize("layer", [0, 1])
def test_hooks_are_never_lost(layer, register):
    model = nn.Sequential(plain(32, 32), nn.Conv2d(32, 5, 1))
    seen = []
    getattr(model[0][layer], register)(lambda *_: seen.append(1))
    report = slimify(model)
    assert "hooks, which would be lost" in report.left["0.0"]
    assert trains(model, torch.randn(2, 32, 8, 8))
    assert seen


def test_norms_of_other_classes():
    class Renamed(nn.BatchNorm2d):
        pass

    class Louder(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    for norm, left in ((Renamed, nn.Identity), (Louder, Louder)):
        model = nn.Sequential(plain(32, 32, norm=norm), nn.Conv2d(32, 5, 1))
        assert slimify(model).replaced == ["0.0"]
        assert type(model[0][1]) is left
        assert trains(model, torch.randn(2, 32, 8, 8))


def test_a_convolution_as_the_whole_network_is_left_alone():
    model = nn.Conv2d(64, 64, 3, padding=1)
    assert "is the whole network" in substitute(model, SCConv2d).left[""]
    assert not list(model.children())


def test_a_second_call_slims_no_reader_of_the_first():
    model = nn.Sequential(plain(3, 64), plain(64, 64), plain(64, 64), nn.Conv2d(64, 5, 1))
    assert slimify(model).replaced == ["1.0"]
    again = slimify(model)
    assert again.left["2.0"] == "reads 1.0, which is slimmed, and restores the width"
