"""Carrying a plan out: pieces in, one output file out, by the cheapest means the two stores offer."""

from ptbin.splice.execute import SpliceResult, check_copies, splice

__all__ = ["SpliceResult", "check_copies", "splice"]
