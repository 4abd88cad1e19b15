"""Rewriting networks on their channel graph: who writes a channel space, who reads it."""

from slimconv_lit.surgery.fuse import FusedRow, FuseReport, fuse
from slimconv_lit.surgery.plan import Plan, apply_plan, apply_plans, plans_of
from slimconv_lit.surgery.prune import PrunedRow, PruneReport, prunable_norms, prune
from slimconv_lit.surgery.substitute import Report, Row, Substitution, slimify, substitute

__all__ = [
    "FuseReport",
    "FusedRow",
    "Plan",
    "PruneReport",
    "PrunedRow",
    "Report",
    "Row",
    "Substitution",
    "apply_plan",
    "apply_plans",
    "fuse",
    "plans_of",
    "prunable_norms",
    "prune",
    "slimify",
    "substitute",
]
