"""The callbacks of lightning-bolts that are worth having, on a Lightning that it was not written for.

lightning-bolts 0.6 has been frozen since 2023 and looks for three names that Lightning 2 and torch 2 no longer have.
They are put back here, when one of the callbacks is first asked for. Nothing else in the package imports this module.

BatchGradientVerificationCallback: fails if the model mixes the images of a batch (set `task.example_input_array`).
ModuleDataMonitor, TrainingDataMonitor: histograms of what layers and training steps are given, in TensorBoard or W&B.
PrintTableMetricsCallback: all metrics as a table at the end of each epoch.
"""

import importlib
import sys
import types
import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pl_bolts.callbacks import BatchGradientVerificationCallback as BatchGradientVerificationCallback
    from pl_bolts.callbacks import ModuleDataMonitor as ModuleDataMonitor
    from pl_bolts.callbacks import PrintTableMetricsCallback as PrintTableMetricsCallback
    from pl_bolts.callbacks import TrainingDataMonitor as TrainingDataMonitor

__all__ = [
    "BatchGradientVerificationCallback",
    "ModuleDataMonitor",
    "PrintTableMetricsCallback",
    "TrainingDataMonitor",
]


def _put_back_removed_names() -> None:
    import lightning_utilities.core.apply_func
    import pytorch_lightning.loggers
    import torch

    # Renamed to Logger.
    pytorch_lightning.loggers.LightningLoggerBase = pytorch_lightning.loggers.Logger  # type: ignore[attr-defined]
    # Moved to lightning_utilities.
    sys.modules.setdefault("pytorch_lightning.utilities.apply_func", lightning_utilities.core.apply_func)
    # Removed from torch; only Python 2's text type was asked of it.
    if "torch._six" not in sys.modules:
        six = types.ModuleType("torch._six")
        six.string_classes = str  # type: ignore[attr-defined]
        sys.modules["torch._six"] = torch._six = six  # type: ignore[attr-defined]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    _put_back_removed_names()
    # It calls itself under review, in every class, and overrides filters; it will stay so.
    with warnings.catch_warnings(record=True):
        callback = getattr(importlib.import_module("pl_bolts.callbacks"), name)
    review = importlib.import_module("pl_bolts.utils.stability").UnderReviewWarning
    warnings.filterwarnings("ignore", category=review)
    globals()[name] = callback
    return callback


def __dir__() -> list[str]:
    return sorted(__all__)
