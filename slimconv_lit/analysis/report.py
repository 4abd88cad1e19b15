"""The tables behind the command line's `models` and `profile`; both build networks without weights, so in no time."""

import textwrap
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from slimconv_lit.analysis import conventions
from slimconv_lit.analysis.complexity import InputSize, LayerCost, macs_by_layer, params
from slimconv_lit.backbones.presets import PRESETS
from slimconv_lit.backbones.registry import create_backbone, list_backbones, made_for, unknown_backbone
from slimconv_lit.ops import OperatorLike, describe_operator
from slimconv_lit.tables import TableStyle, format_table


def models_rows(pattern: str | None = None) -> list[dict[str, object]]:
    """One row for each backbone that matches `pattern`, as built and counted for the data that it was made for.

    A progress bar appears on a terminal's stderr when it takes more than a second.

    Args:
        pattern: As in `list_backbones`; None or "" for our own and torchvision's, which are not counted then: that
            takes a minute, and "*" does it.

    Raises:
        ValueError: If no backbone matches; the message gives the nearest names.
    """
    pattern_or_all = pattern or "*"
    # A name without its library means torchvision's before timm's.
    tries = (pattern_or_all, f"torchvision:{pattern_or_all}", f"timm:{pattern_or_all}")
    names = next((found for found in map(list_backbones, tries) if found), None)
    if not names:
        raise ValueError(f"no network matches: {unknown_backbone(pattern_or_all)}")
    rows: list[dict[str, object]] = []
    for name in tqdm(names, desc="counting", unit=" networks", leave=False, delay=1, disable=None):
        size, classes = made_for(name)
        counts = {}
        if pattern:
            model = create_backbone(name, num_classes=classes, without_weights=True)
            counts = {"params": params(model), "macs": conventions.macs(conventions.operations(model, size))}
        rows.append({"backbone": name, **counts, "image": f"{size}x{size}", "classes": classes})
    return rows


def models_table(pattern: str | None = None, style: TableStyle = "table") -> str:
    """`models_rows` as text; without a pattern the terminal gets the names alone, by library, and how to see more.

    Raises:
        ValueError: As `models_rows`, or if `style` is unknown.
    """
    if pattern or style != "table":
        return format_table(models_rows(pattern), style)
    names = list_backbones()
    libraries = {"ours": [n for n in names if ":" not in n], "torchvision": [n for n in names if ":" in n]}
    parts = [
        f"{library}, {len(found)}:\n{textwrap.fill('  '.join(found), 116, initial_indent='  ', subsequent_indent='  ')}"
        for library, found in libraries.items()
    ]
    parts.append(f"timm, {len(list_backbones('timm:*')):,}: give a pattern, such as 'timm:resnet*'")
    return "\n\n".join([*parts, "a pattern counts those that match: python -m slimconv_lit models 'cifar_*'"])


def profile_rows(
    backbone: str,
    operator: OperatorLike | None = None,
    num_classes: int | None = None,
    input_size: InputSize | None = None,
    depth: int | None = 2,
    **options: Any,
) -> list[dict[str, object]]:
    """What each part of a backbone costs for one image, and last the total; with an operator also relative to plain.

    A backbone that has an operator in its name ("sc_resnet50") is compared with the plain one ("torchvision:resnet50").

    Args:
        backbone: As in `create_backbone`.
        operator: As in `create_backbone`.
        num_classes: Width of the classifier; None for the data that the backbone was made for.
        input_size: Of the image, as in `macs`; None for the data that the backbone was made for.
        depth: How deep to look: 1 has a row for "layer1", 2 for "layer1.0", 0 for the total alone, None for each layer.
        **options: More arguments of `create_backbone`.

    Raises:
        ValueError: As `create_backbone`.
    """
    size, classes = made_for(backbone)
    options = {"num_classes": num_classes or classes, **options}
    total, *costs = _costs(backbone, operator, input_size or size, options)
    plain_name = PRESETS[backbone].backbone if backbone in PRESETS else backbone
    compared = operator is not None or plain_name != backbone
    plain = _costs(plain_name, None, input_size or size, options) if compared else []
    counterparts = {cost.name: cost for cost in plain}
    containers = {cost.name.rpartition(".")[0] for cost in costs}
    shown = [cost for cost in costs if _is_shown(cost, cost.name in containers, depth)]
    rows: list[dict[str, object]] = []
    for cost in [*shown, total]:
        row: dict[str, object] = {"layer": cost.name or "total", "type": cost.type}
        row |= {"params": cost.params, "macs": cost.macs, "output": "x".join(map(str, cost.output))}
        if compared:
            before = counterparts.get(cost.name)
            row["params/plain"] = _ratio(cost.params, before.params if before else 0)
            row["macs/plain"] = _ratio(cost.macs, before.macs if before else 0)
        rows.append(row)
    return rows


def profile_table(
    backbone: str,
    operator: OperatorLike | None = None,
    num_classes: int | None = None,
    input_size: InputSize | None = None,
    depth: int | None = 2,
    style: TableStyle = "table",
    **options: Any,
) -> str:
    """`profile_rows` as text; the table for the terminal begins with a line that says what was counted.

    Raises:
        ValueError: As `profile_rows`, or if `style` is unknown.
    """
    text = format_table(profile_rows(backbone, operator, num_classes, input_size, depth, **options), style)
    if style != "table":
        return text
    own_size, own_classes = made_for(backbone)
    size = input_size or own_size
    image = f"{size}x{size}" if isinstance(size, int) else "x".join(map(str, size))
    preset = PRESETS.get(backbone)
    operator = operator or (preset.operator if preset else None)
    with_operator = f" with {_operator_text(operator)}" if operator else ""
    return f"{backbone}{with_operator}, {num_classes or own_classes:,} classes, one image of {image}\n\n{text}"


def _costs(
    backbone: str, operator: OperatorLike | None, input_size: InputSize, options: Mapping[str, Any]
) -> list[LayerCost]:
    model = create_backbone(backbone, operator, **options, without_weights=True)
    return macs_by_layer(model, input_size)


def _is_shown(cost: LayerCost, is_container: bool, depth: int | None) -> bool:
    level = cost.name.count(".") + 1
    if not cost.params and not cost.macs:
        return False
    return not is_container if depth is None else level == depth or (level < depth and not is_container)


def _ratio(value: int, plain: int) -> float | None:
    return round(value / plain, 4) if plain else None


def _operator_text(operator: OperatorLike) -> str:
    parts = describe_operator(operator)
    arguments = ", ".join(f"{key}={value}" for key, value in parts["init_args"].items())
    return f"{parts['class_path'].rpartition('.')[2]}({arguments})"
