"""What results.json holds, as a line, a table, and the star of results that are of a part of the data only."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from slimconv_lit.tables import format_table


def limits_of(trainer: Any, datamodule: Any, *stages: str) -> str:
    """The limits by which less than all of the data took part: "limit_train_batches=2", or nothing.

    Args:
        trainer: That has been through the stages.
        datamodule: Of the same run.
        *stages: As loaders are called: "train", "val", "test".
    """
    found = []
    for stage in stages:
        limit = getattr(trainer, name := f"limit_{stage}_batches")
        # 1.0 is all of them, and 1 is one batch.
        if not (isinstance(limit, float) and limit == 1):
            loaders = getattr(datamodule, f"{stage}_dataloader")()
            sizes = [len(loader) for loader in (loaders if isinstance(loaders, list) else [loaders])]
            if isinstance(limit, float) or limit < max(sizes):
                found.append(f"{name}={limit}")
    return ", ".join(found)


def describe_network(hparams: Mapping[str, Any]) -> str:
    """A network in a few words: "cifar_resnet20 + SlimConv2d k=4/3"."""
    operator = hparams["operator"]
    if not operator:
        return str(hparams["backbone"])
    k = operator["init_args"].get("k", "")
    if isinstance(k, float):
        # As it is written: 4/3.
        thirds = Fraction(k).limit_denominator(3)
        k = thirds if math.isclose(k, thirds, rel_tol=1e-6) else f"{k:.4g}"
    shown = f" k={k}" if k else ""
    return f"{hparams['backbone']} + {operator['class_path'].rpartition('.')[2]}{shown}"


def summary(results: Mapping[str, Any], *monitors: str) -> dict[str, Any]:
    """`results` for a table: of the test's metrics those that checkpoints are chosen by, in percent."""
    scores = {f"test/{monitor.partition('/')[2]}" for monitor in monitors}
    kept = {key: value for key, value in results.items() if key in scores or not key.startswith("test/")}
    return {(f"{k} %" if k in scores else k): (round(100 * v, 2) if k in scores else v) for k, v in kept.items()}


def results_table(rows: Sequence[Mapping[str, Any]], *monitors: str) -> str:
    """Results for a terminal. Those of limited batches have a star, which a line below the table explains."""
    shown = [summary(row, *monitors) for row in rows]
    limits = [row.pop("limited", "") for row in shown]
    for row, limit in zip(shown, limits, strict=True):
        row["network"] += " *" * bool(limit)
    return "\n".join([format_table(shown), *(f"* {of_a_part(limit)}" for limit in dict.fromkeys(limits) if limit)])


def of_a_part(limited: str) -> str:
    """The line that says of which limited batches results are."""
    return f"of a part of the data only: {limited}"
