"""Looking at a model, never training it."""

from slimconv_lit.analysis.complexity import LayerCost, macs, macs_by_layer, params
from slimconv_lit.analysis.report import models_rows, models_table, profile_rows, profile_table

__all__ = [
    "LayerCost",
    "macs",
    "macs_by_layer",
    "models_rows",
    "models_table",
    "params",
    "profile_rows",
    "profile_table",
]
