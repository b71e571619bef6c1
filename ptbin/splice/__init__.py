"""Carrying a plan out: pieces in, one output file out, by the cheapest means the two stores offer."""

from ptbin.splice.execute import SpliceResult, check_copies, splice
from ptbin.splice.recipes import iter_recipe

__all__ = ["SpliceResult", "check_copies", "iter_recipe", "splice"]
