"""Rewriting networks on their channel graph: who writes a channel space, who reads it."""

from slimconv_lit.surgery.substitute import Report, Row, slimify, substitute

__all__ = ["Report", "Row", "slimify", "substitute"]
