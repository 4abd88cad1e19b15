"""What must hold for any network: after `slimify` it runs and trains as before, and only what had to change changed."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from slimconv_lit import SlimConv2d, slimify

WIDTH = 32


class Block(nn.Module):
    """One of the ways in which networks wire their convolutions; reads and writes WIDTH channels."""

    def __init__(self, kind, hidden, kernel, stride, groups, norm):
        super().__init__()
        self.kind, self.stride = kind, stride
        pad = kernel // 2
        norms = {"batch": nn.BatchNorm2d, "group": lambda n: nn.GroupNorm(4, n), "none": lambda n: nn.Identity()}
        self.expand = nn.Conv2d(WIDTH, hidden, 1)
        self.spatial = nn.Conv2d(hidden, hidden, kernel, stride, pad, groups=hidden if groups == 0 else groups)
        self.second = nn.Conv2d(hidden, hidden, 3, 1, 1)
        self.norm = norms[norm](hidden)
        self.squeeze, self.excite = nn.Linear(hidden, 4), nn.Linear(4, hidden)
        self.project = nn.Conv2d(hidden * (2 if kind == "dense" else 1), WIDTH, 1)

    def forward(self, x):
        y = self.expand(x)
        z = functional.relu(self.norm(self.spatial(functional.relu(y))))
        if self.kind == "two":
            z = functional.silu(self.second(z))
        elif self.kind == "gated":
            gate = torch.sigmoid(self.excite(functional.relu(self.squeeze(z.mean((2, 3))))))
            z = z * gate[:, :, None, None]
        elif self.kind == "dense":
            z = torch.cat([z, functional.max_pool2d(y, 1, self.stride)], 1)
        elif self.kind == "shuffled":
            b, c, h, w = z.shape
            z = z.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        elif self.kind == "split":
            a, b = z.chunk(2, 1)
            z = torch.cat([b, a], 1)
        elif self.kind == "flipped":
            z = z + z.flip(1)
        z = self.project(z)
        return z + functional.avg_pool2d(x, 1, self.stride) if self.kind == "residual" else z


blocks = st.builds(
    Block,
    st.sampled_from(["plain", "two", "gated", "dense", "shuffled", "split", "flipped", "residual"]),
    st.sampled_from([32, 48, 64]),
    st.sampled_from([3, 5]),
    st.integers(1, 2),
    st.sampled_from([0, 1, 2, 4]),
    st.sampled_from(["batch", "group", "none"]),
)


@settings(max_examples=40)
@given(st.lists(blocks, min_size=1, max_size=4), st.sampled_from(["4/3", "2", "8/3"]))
def test_runs_trains_and_keeps_what_need_not_change(parts, k):
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 3, padding=1), *parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(WIDTH, 3))
    x = torch.randn(2, 3, 19, 17)
    shape = model(x).shape
    before = {name: value.clone() for name, value in model.state_dict().items()}
    spatial = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1)]

    report = slimify(model, k=k, example_input=x)

    assert sorted(row.layer for row in report.rows) == sorted(spatial)
    assert all(row.now or row.why for row in report.rows)
    operators = [n for n, m in model.named_modules() if isinstance(m, SlimConv2d)]
    assert sorted(operators) == sorted(report.replaced)
    touched = {layer for row in report.rows if row.now for layer in row.why.removeprefix("narrowed ").split(", ")}
    after = model.state_dict()
    for name, value in before.items():
        layer, _, leaf = name.rpartition(".")
        if name in after and after[name].shape == value.shape:
            assert torch.equal(after[name], value)
        elif name in after and leaf == "weight":
            assert layer in touched or layer.endswith(".norm")
    for part, prefix in zip(parts, range(1, 9), strict=False):
        private = part.kind in ("plain", "two", "gated", "residual")
        divides = part.spatial.groups in (1, 2, 4) if f"{prefix}.spatial" not in report.replaced else True
        if private and divides and f"{prefix}.spatial" not in report.replaced:
            # The only reasons that are left in these blocks: group counts that the narrower widths do not divide into.
            assert "groups" in report.left[f"{prefix}.spatial"], report
        if not private:
            assert f"{prefix}.spatial" in report.left

    assert model.train()(x).shape == shape
    model(x).square().mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert all(p.grad is not None for m in model.modules() if isinstance(m, SlimConv2d) for p in m.parameters())
    restored = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(restored)
    assert model.eval()(x).shape == shape
