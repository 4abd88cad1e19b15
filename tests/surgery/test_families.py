"""`slimify` on whole families of torchvision's and timm's networks, and the paper's integers on torchvision's."""

import warnings

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from slimconv_lit import SlimConv2d, slimify

# One small member of each family, and how many of its spatial convolutions SlimConv replaces.
TORCHVISION = {
    "resnet18": 8,
    "resnext50_32x4d": 16,
    "wide_resnet50_2": 16,
    "densenet121": 0,
    "mobilenet_v2": 17,
    "mobilenet_v3_small": 10,
    "efficientnet_b0": 16,
    "regnet_y_400mf": 16,
    "shufflenet_v2_x0_5": 14,
    "squeezenet1_1": 0,
    "googlenet": 1,
    "vgg11_bn": 4,
    "mnasnet0_5": 15,
    "convnext_tiny": 18,
}

# Those that differ in what their graphs are made of.
COMPILED = {"resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "googlenet", "convnext_tiny"}

TIMM = [
    "cspresnet50", "cs3darknet_s", "darknet17", "densenet121", "dla34", "dla46_c", "dpn48b", "efficientnet_lite0",
    "efficientvit_b0", "fbnetc_100", "gernet_s", "ghostnet_050", "hardcorenas_a", "hrnet_w18_small", "inception_v3",
    "lcnet_050", "legacy_seresnet18", "mixnet_s", "mnasnet_small", "mobilenetv2_050", "mobilenetv3_small_050",
    "convnext_atto", "regnetx_002", "regnety_002", "repvgg_a0", "res2net50_14w_8s", "resnest14d", "resnet10t",
    "resnetv2_50", "rexnet_100", "selecsls42", "seresnext26d_32x4d", "skresnet18", "spnasnet_100", "tf_efficientnet_b0",
    "tinynet_e", "vovnet39a", "xception41",
]  # fmt: skip


def spatial(model):
    return [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]


def tensors(output):
    return [leaf for leaf in tree_iter(output) if isinstance(leaf, torch.Tensor)]


def accounts_for_all(report, names):
    return sorted(row.layer for row in report.rows) == sorted(names) and all(row.now or row.why for row in report.rows)


def step(model, x):
    """One training step; every parameter that took part got a finite gradient."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sum(t.float().square().mean() for t in tensors(model(x))).backward()
    optimizer.step()
    return all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def quietly(build):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return build()


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_runs_trains_compiles_and_exports(name):
    torch.manual_seed(0)
    model = quietly(lambda: torchvision.models.get_model(name, num_classes=10))
    names = spatial(model)
    report = slimify(model)
    assert accounts_for_all(report, names)
    assert len(report.replaced) == TORCHVISION[name], report
    assert sum(isinstance(m, SlimConv2d) for m in model.modules()) == TORCHVISION[name]

    x = torch.randn(2, 3, 64, 64)
    assert step(model, x)
    if not report.replaced:
        return
    model.eval()
    with torch.no_grad():
        wanted = model(x)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), wanted)
        if name in COMPILED:
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), wanted)
            torch.compiler.reset()


def test_inductor_runs_and_trains_the_slim_network():
    model = nn.Sequential(nn.Conv2d(3, 32, 1), nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Conv2d(32, 4, 1))
    assert slimify(model, k=2).replaced == ["1"]
    x = torch.randn(2, 3, 16, 16)
    eager = model.eval()(x)
    compiled = torch.compile(model)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), eager, rtol=1e-4, atol=1e-4)
    assert step(compiled, x)
    torch.compiler.reset()


@pytest.mark.parametrize("name", TIMM)
def test_timm_runs_and_trains(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10)
    names = spatial(model)
    report = slimify(model)
    assert accounts_for_all(report, names)
    assert not any("traced" in why or "does not run" in why for why in report.left.values()), report
    size = 96 if name.startswith("inception") else 64
    x = torch.randn(2, 3, size, size)
    assert step(model, x)
    assert model.eval()(x).shape == (2, 10)


def count(model, size):
    model = model.to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, size, size, device="meta"))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("name", "k", "params", "macs"),
    [
        ("resnet50", 4 / 3, 16_758_740, 2_652_222_208),
        ("resnet50", "8/3", 12_098_388, 1_880_314_624),
        ("resnet101", 4 / 3, 27_956_708, 4_822_303_488),
        ("resnext50_32x4d", 4 / 3, 22_492_512, 3_821_358_080),
    ],
)
def test_counts_of_table_1(name, k, params, macs):
    with torch.device("meta"):
        model = torchvision.models.get_model(name)
    slimify(model, k=k)
    assert count(model, 224) == (params, macs)
