"""The equations of the paper, written once more: no code is shared with the package, and speed is no matter.

Everything is float64 and spelled out: convolutions are sums over shifted windows, norms are written by hand.
"""

import torch


def convolve(x, weight, stride=1, dilation=1, groups=1, bias=None):
    """A convolution as a sum over kernel positions; "same" padding."""
    out_channels, per_group, kh, kw = weight.shape
    pad_h, pad_w = dilation * (kh // 2), dilation * (kw // 2)
    b, c, h, w = x.shape
    padded = x.new_zeros(b, c, h + 2 * pad_h, w + 2 * pad_w)
    padded[:, :, pad_h : pad_h + h, pad_w : pad_w + w] = x
    rows = (h + 2 * pad_h - dilation * (kh - 1) - 1) // stride + 1
    columns = (w + 2 * pad_w - dilation * (kw - 1) - 1) // stride + 1
    result = x.new_zeros(b, groups, out_channels // groups, rows, columns)
    kernel = weight.reshape(groups, out_channels // groups, per_group, kh, kw)
    for i in range(kh):
        for j in range(kw):
            top, left = i * dilation, j * dilation
            window = padded[:, :, top : top + rows * stride : stride, left : left + columns * stride : stride]
            window = window[:, :, :rows, :columns].reshape(b, groups, per_group, rows, columns)
            result = result + torch.einsum("bgihw,goi->bgohw", window, kernel[..., i, j])
    result = result.reshape(b, out_channels, rows, columns)
    return result if bias is None else result + bias[None, :, None, None]


def normalise(x, p, name, training):
    if training:
        mean = x.mean(dim=(0, 2, 3), keepdim=True)
        variance = ((x - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    else:
        mean = p[f"{name}.running_mean"][None, :, None, None]
        variance = p[f"{name}.running_var"][None, :, None, None]
    scale, shift = p[f"{name}.weight"][None, :, None, None], p[f"{name}.bias"][None, :, None, None]
    return (x - mean) / (variance + 1e-5) ** 0.5 * scale + shift


def fold(x, folds):
    """Sums the folds: channel j of the result is the sum over i of channel i * T + j."""
    width = x.shape[1] // folds
    return torch.stack([sum(x[:, i * width + j] for i in range(folds)) for j in range(width)], dim=1)


def slim_conv(x, p, folds, arrangement, stride=1, dilation=1, top_groups=1, low_groups=1, training=False):
    """SlimConv of `x` (B, C, H, W) with the parameters `p`, a state dict."""
    pooled = x.mean(dim=(2, 3), keepdim=True)
    hidden = normalise(convolve(pooled, p["gate.squeeze.weight"]), p, "gate.norm", training)
    hidden = hidden * (hidden > 0)
    logits = convolve(hidden, p["gate.excite.weight"], bias=p["gate.excite.bias"])
    w = 1 / (1 + torch.exp(-logits))
    channels = x.shape[1]
    flipped = torch.stack([w[:, channels - 1 - i] for i in range(channels)], dim=1)
    weights = {
        "flip": [w, flipped],
        "none": [w, w],
        "only_flip": [flipped, flipped],
        "shuffle": [w, w[:, p["order"]] if "order" in p else w],
        "shuffle_3b": [w, flipped, w[:, p["order"]] if "order" in p else w],
    }[arrangement]

    top = convolve(fold(x * weights[0], folds), p["top.0.weight"], stride, dilation, top_groups)
    outputs = [normalise(top, p, "top.1", training)]
    for path, weight in zip(("bottom", "third"), weights[1:], strict=False):
        low = normalise(convolve(fold(x * weight, folds), p[f"{path}.0.weight"]), p, f"{path}.1", training)
        low = convolve(low * (low > 0), p[f"{path}.3.weight"], stride, dilation, low_groups)
        outputs.append(normalise(low, p, f"{path}.4", training))
    return torch.cat(outputs, dim=1)


def average(x, size):
    """Averages over windows of `size`, each over the pixels that it holds."""
    rows, columns = -(-x.shape[2] // size), -(-x.shape[3] // size)
    windows = [
        x[:, :, i * size : (i + 1) * size, j * size : (j + 1) * size] for i in range(rows) for j in range(columns)
    ]
    return torch.stack([w.mean(dim=(2, 3)) for w in windows], dim=-1).reshape(*x.shape[:2], rows, columns)


def upscale(x, rows, columns):
    """Every pixel twice in either direction, cut to the size that is wanted."""
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)[:, :, :rows, :columns]


def ghost(x, p, stride=1, dilation=1, groups=1, training=False):
    """GhostNet, Eq. 2 and 3: primary channels, and linear depthwise functions of them behind."""
    primary = normalise(convolve(x, p["primary.0.weight"], stride, dilation, groups), p, "primary.1", training)
    cheap = convolve(primary, p["cheap.0.weight"], groups=primary.shape[1])
    return torch.cat([primary, normalise(cheap, p, "cheap.1", training)], dim=1)


def sp_conv(x, p, heavy, stride=1, dilation=1, training=False):
    """SPConv, Fig. 4."""
    rich, rest = x[:, :heavy], x[:, heavy:]
    spatial = convolve(rich, p["spatial.weight"], stride, dilation, groups=2)
    rich = normalise(spatial + convolve(average(rich, stride), p["pointwise.weight"]), p, "heavy_norm", training)
    rest = convolve(average(rest, stride), p["light.0.weight"], bias=p["light.0.bias"])
    rest = normalise(rest, p, "light.1", training)
    a, b = (torch.exp(m.mean(dim=(2, 3), keepdim=True)) for m in (rich, rest))
    return normalise((a * rich + b * rest) / (a + b), p, "norm", training)


def select_kernel(x, p, stride=1, dilation=1, groups=1, training=False):
    """SKNet, Eq. 1 to 6, with a bias in the place of the norm of Eq. 4."""
    maps = []
    for name in ("small", "large"):
        u = normalise(convolve(x, p[f"{name}.0.weight"], stride, dilation, groups), p, f"{name}.1", training)
        maps.append(u * (u > 0))
    z = (maps[0] + maps[1]).mean(dim=(2, 3)) @ p["squeeze.weight"].T + p["squeeze.bias"]
    z = z * (z > 0)
    a, b = (torch.exp(z @ p[f"select.{i}.weight"].T + p[f"select.{i}.bias"])[:, :, None, None] for i in range(2))
    return (a * maps[0] + b * maps[1]) / (a + b)


def se_conv(x, p, stride=1, dilation=1, groups=1, training=False):
    """SENet, Eq. 2 to 4, behind a convolution and a norm."""
    u = normalise(convolve(x, p["conv.weight"], stride, dilation, groups), p, "norm", training)
    z = convolve(u.mean(dim=(2, 3), keepdim=True), p["gate.fc1.weight"], bias=p["gate.fc1.bias"])
    return u / (1 + torch.exp(-convolve(z * (z > 0), p["gate.fc2.weight"], bias=p["gate.fc2.bias"])))


def octave(high, low, p, stride=1, dilation=1, groups=1, training=False):
    """Octave convolution, Eq. 2, with a norm for each of the two maps; a stride is a pooling in front."""
    high, low = average(high, stride), average(low, stride)
    weight = {name.removesuffix(".weight"): value for name, value in p.items() if "_to_" in name}
    high_groups = low_groups = groups
    if groups == "depthwise":
        high_groups, low_groups = high.shape[1], low.shape[1]
    out_high = convolve(high, weight["high_to_high"], dilation=dilation, groups=high_groups)
    out_low = convolve(low, weight["low_to_low"], dilation=dilation, groups=low_groups)
    if groups != "depthwise":
        out_low = out_low + convolve(average(high, 2), weight["high_to_low"], dilation=dilation, groups=groups)
        up = upscale(convolve(low, weight["low_to_high"], dilation=dilation, groups=groups), *out_high.shape[2:])
        out_high = out_high + up
    return normalise(out_high, p, "high_norm", training), normalise(out_low, p, "low_norm", training)


def oct_conv(x, p, low_width, stride=1, dilation=1, groups=1, training=False):
    """The same between ordinary maps: the last channels are the low ones."""
    inner = {name.removeprefix("octave."): value for name, value in p.items()}
    split = x.shape[1] - low_width
    high, low = octave(x[:, :split], average(x[:, split:], 2), inner, stride, dilation, groups, training)
    return torch.cat([high, upscale(low, *high.shape[2:])], dim=1)


def spatial_unit(x, p, name, norm_groups=4, gate="soft"):
    """SCConv, Eq. 1 to 4; informative is where the share of the scale times the normed map is above zero."""
    b, c, h, w = x.shape
    grouped = x.reshape(b, norm_groups, -1)
    mean = grouped.mean(dim=2, keepdim=True)
    variance = ((grouped - mean) ** 2).mean(dim=2, keepdim=True)
    normed = ((grouped - mean) / (variance + 1e-5) ** 0.5).reshape(b, c, h, w)
    scale, shift = p[f"{name}.norm.weight"], p[f"{name}.norm.bias"]
    share = scale / sum(scale)
    z = share[None, :, None, None] * (normed * scale[None, :, None, None] + shift[None, :, None, None])
    soft, above = 1 / (1 + torch.exp(-z)), z > 0
    if gate == "soft":
        more, less = torch.where(above, torch.ones_like(z), soft), torch.where(above, torch.zeros_like(z), soft)
    else:
        # The value of the mask and the slope of the sigmoid.
        slope = soft - soft.detach()
        more, less = above.to(z.dtype) + slope, (~above).to(z.dtype) - slope
    first, second = [(more * x).chunk(2, dim=1), (less * x).chunk(2, dim=1)]
    return torch.cat([first[0] + second[1], second[0] + first[1]], dim=1)


def channel_unit(x, p, name, upper, stride=1, dilation=1, inner_groups=2):
    """SCConv, Eq. 5 to 9, and the 1x1 that its tables count beyond the text, where there is one."""

    def conv(part, z, **more):
        return convolve(z, p[f"{name}.{part}.weight"], bias=p[f"{name}.{part}.bias"], **more)

    up, low = conv("squeeze_upper", x[:, :upper]), conv("squeeze_lower", x[:, upper:])
    rich = conv("spatial", up, stride=stride, dilation=dilation, groups=inner_groups)
    up, low = average(up, stride), average(low, stride)
    rich = rich + conv("pointwise_upper", up)
    if f"{name}.extra.weight" in p:
        rich = rich + torch.cat([conv("extra", up), up], dim=1)
    if f"{name}.pointwise_lower.weight" in p:
        low = torch.cat([conv("pointwise_lower", low), low], dim=1)
    a, b = (torch.exp(m.mean(dim=(2, 3), keepdim=True)) for m in (rich, low))
    return (a * rich + b * low) / (a + b)


def sc_conv(x, p, order="S+C", upper=8, gate="soft", stride=1, dilation=1, training=False):
    """SCConv: its units in some order, and a norm."""

    def s(z):
        return spatial_unit(z, p, "sru", gate=gate)

    def c(z):
        return channel_unit(z, p, "cru", upper, stride, dilation)

    if order == "S":
        y = convolve(s(x), p["conv.weight"], stride, dilation)
    else:
        y = {
            "C": lambda: c(x), "S+C": lambda: c(s(x)), "C+S": lambda: s(c(x)),
            "parallel": lambda: average(s(x), stride) + c(x),
        }[order]()  # fmt: skip
    return normalise(y, p, "norm", training)


def join(x, how="max", group_size=2, layout="adjacent"):
    """Compact convolution's operation across channels, group by group."""
    width = x.shape[1] // group_size
    groups = [
        [x[:, j * group_size + i] if layout == "adjacent" else x[:, i * width + j] for i in range(group_size)]
        for j in range(width)
    ]
    operations = {
        "max": lambda g: torch.stack(g).max(dim=0).values,
        "min": lambda g: torch.stack(g).min(dim=0).values,
        "mean": lambda g: torch.stack(g).mean(dim=0),
        "sum": lambda g: torch.stack(g).sum(dim=0),
        "difference": lambda g: 2 * g[0] - torch.stack(g).sum(dim=0),
        "product": lambda g: torch.stack(g).prod(dim=0),
    }
    return torch.stack([operations[how](group) for group in groups], dim=1)


def compact_conv(x, p, how="max", group_size=2, layout="adjacent", stride=1, dilation=1, groups=1, training=False):
    """Depthwise, norm, join; with an ordinary host also ReLU, pointwise, norm."""
    y = convolve(x, p["depthwise.0.weight"], stride, dilation, groups=x.shape[1])
    y = join(normalise(y, p, "depthwise.1", training), how, group_size, layout)
    if groups > 1:
        return y
    return normalise(convolve(y * (y > 0), p["pointwise.1.weight"]), p, "pointwise.2", training)
