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
