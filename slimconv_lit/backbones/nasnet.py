"""NASNet-A for 32x32 images.

Zoph et al., "Learning Transferable Architectures for Scalable Image Recognition", CVPR 2018,
https://arxiv.org/abs/1707.07012, Fig. 4

A cell reads what the last cell (x) and the one before (prev) wrote, fits both to its own width, and concatenates what
pairs of operations make of them. A reduction cell halves the map. Which convolutions have a bias follows no design: it
is what SlimConv's Table V counts.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Separable(nn.Module):
    """ReLU, depthwise, 1x1 and norm, twice, the stride in the first: (B, C, H, W) -> (B, C, H / stride, W / stride)."""

    def __init__(self, channels: int, kernel: int, stride: int = 1, bias: bool = True) -> None:
        super().__init__()

        def half(stride: int, bias: bool) -> nn.Sequential:
            return nn.Sequential(
                nn.ReLU(),
                nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=bias),
                nn.Conv2d(channels, channels, 1),
                nn.BatchNorm2d(channels),
            )

        self.first, self.second = half(stride, bias), half(1, True)

    def forward(self, x: Tensor) -> Tensor:
        """The branch's output; see the class."""
        return self.second(self.first(x))


class Halve(nn.Module):
    """A map of half the size from its even and its odd pixels: (B, C, H, W) -> (B, channels, H / 2, W / 2)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.pick = nn.AvgPool2d(1, 2)
        self.even, self.odd = (nn.Conv2d(in_channels, channels // 2, 1) for _ in range(2))
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """The smaller map; see the class."""
        x = self.relu(x)
        moved_by_one = functional.pad(x, (-1, 1, -1, 1))
        return self.bn(torch.cat([self.even(self.pick(x)), self.odd(self.pick(moved_by_one))], dim=1))


def _pointwise(in_channels: int, channels: int, bias: bool = True) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(in_channels, channels, 1, bias=bias), nn.BatchNorm2d(channels))


class Cell(nn.Module):
    """What both kinds of cell have: the two maps that they read are fitted to `channels`.

    Args:
        x_channels: Width of x.
        prev_channels: Width of prev.
        channels: Width of the maps inside.
        halve_prev: Whether prev is twice as large as x.
        bias: Whether the 1x1 convolution that fits x, and the first depthwise one of each branch, have a bias.
        unused_layers: Also make the ways to fit prev that this cell does not take; see `CifarNASNet`.
    """

    def __init__(
        self, x_channels: int, prev_channels: int, channels: int, halve_prev: bool, bias: bool, unused_layers: bool
    ) -> None:
        super().__init__()
        self.fit_x = _pointwise(x_channels, channels, bias)
        ways: dict[str, nn.Module] = {}
        if halve_prev or unused_layers:
            ways["halve"] = Halve(prev_channels, channels)
        if (prev_channels != channels and not halve_prev) or unused_layers:
            ways["widen"] = _pointwise(prev_channels, channels)
        taken = "halve" if halve_prev else "widen" if prev_channels != channels else ""
        self.fit_prev = ways.pop(taken, nn.Identity())
        self.unused = nn.ModuleDict(ways)


class NormalCell(Cell):
    """Maps x (B, x_channels, H, W) and prev to (B, 6 * channels, H, W); arguments as `Cell`."""

    def __init__(
        self, x_channels: int, prev_channels: int, channels: int, halve_prev: bool, unused_layers: bool
    ) -> None:
        super().__init__(x_channels, prev_channels, channels, halve_prev, False, unused_layers)
        self.x3, self.x5 = Separable(channels, 3, bias=False), Separable(channels, 5, bias=False)
        self.prev3, self.prev5 = Separable(channels, 3, bias=False), Separable(channels, 5, bias=False)
        self.prev3_too = Separable(channels, 3, bias=False)
        self.average = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor, prev: Tensor) -> Tensor:
        """The cell's output; see the class."""
        x, prev = self.fit_x(x), self.fit_prev(prev)
        pairs = [
            self.x3(x) + x,
            self.prev3(prev) + self.x5(x),
            self.average(x) + prev,
            # Twice, as the search found it and as Table V counts it.
            self.average(prev) + self.average(prev),
            self.prev5(prev) + self.prev3_too(prev),
        ]
        return torch.cat([prev, *pairs], dim=1)


class ReductionCell(Cell):
    """Maps x (B, x_channels, H, W) and prev to (B, 4 * channels, H / 2, W / 2); arguments as `Cell`."""

    def __init__(
        self, x_channels: int, prev_channels: int, channels: int, halve_prev: bool, unused_layers: bool
    ) -> None:
        super().__init__(x_channels, prev_channels, channels, halve_prev, True, unused_layers)
        self.x5, self.prev5 = Separable(channels, 5, 2), Separable(channels, 5, 2)
        self.prev7, self.prev7_too = Separable(channels, 7, 2), Separable(channels, 7, 2)
        self.sum3 = Separable(channels, 3)
        self.maximum, self.average = nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1)
        self.average_sum = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor, prev: Tensor) -> Tensor:
        """The cell's output; see the class."""
        x, prev = self.fit_x(x), self.fit_prev(prev)
        first = self.prev7(prev) + self.x5(x)
        second = self.maximum(x) + self.prev7_too(prev)
        pairs = [
            second,
            self.average(x) + self.prev5(prev),
            self.maximum(x) + self.sum3(first),
            self.average_sum(first) + second,
        ]
        return torch.cat(pairs, dim=1)


class CifarNASNet(nn.Module):
    """(B, in_channels, H, W) -> (B, num_classes): three stages of normal cells, a reduction cell between them.

    Args:
        cells: Normal cells in a stage.
        width: Channels inside the first stage's cells and of the stem.
        num_classes: Width of the classifier.
        in_channels: Channels of the images.
        unused_layers: Also make 887,568 parameters that no forward pass reaches, which SlimConv's Table V counts.
    """

    def __init__(
        self,
        cells: int = 4,
        width: int = 44,
        num_classes: int = 100,
        in_channels: int = 3,
        *,
        unused_layers: bool = False,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))
        self.cells = nn.ModuleList()
        x, prev, halve_prev = width, width, False
        for stage in range(3):
            if stage > 0:
                width *= 2
                self.cells.append(ReductionCell(x, prev, width, False, unused_layers))
                x, prev, halve_prev = 4 * width, x, True
            for _ in range(cells):
                self.cells.append(NormalCell(x, prev, width, halve_prev, unused_layers))
                x, prev, halve_prev = 6 * width, x, False
        self.relu = nn.ReLU()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(x, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits; see the class."""
        x = prev = self.stem(x)
        for cell in self.cells:
            x, prev = cell(x, prev), x
        return self.fc(torch.flatten(self.avgpool(self.relu(x)), 1))
