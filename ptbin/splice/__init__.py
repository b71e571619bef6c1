"""Carrying a plan out: pieces in, one output file out, by the cheapest means the two stores offer."""

from ptbin.splice.execute import SpliceResult, check_copies, splice
from ptbin.splice.recipes import iter_recipe
from ptbin.splice.records import RecordChecks

__all__ = ["RecordChecks", "SpliceResult", "check_copies", "iter_recipe", "splice"]
