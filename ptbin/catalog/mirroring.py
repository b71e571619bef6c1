"""What a mirror does with files that are no checkpoints. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence

from ptbin.catalog.globs import matches
from ptbin.catalog.suffixes import CHECKPOINT_SUFFIXES, suffix_of
from ptbin.sidecars import PATTERNS
from ptbin.stores import ListedObject

__all__ = ["COMPANIONS", "copied_along"]

COMPANIONS = (
    *PATTERNS,
    *("README*", "LICENSE*", "LICENCE*", "NOTICE*"),
    *("*.json", "*.txt", "*.md", "*.yaml", "*.yml", "*.toml", "*.jinja"),
)
"""Names of what belongs to models beside their weights, whatever the folder."""


def copied_along(include: Sequence[str]) -> Callable[[ListedObject], bool]:
    """Says of a file below SOURCE whether it goes along as it is: a model's companion, or one of `include`.

    What by its name is a checkpoint is never copied: it is converted.
    """

    def is_copied(item: ListedObject) -> bool:
        name = item.path.rpartition("/")[2]
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS):
            return True
        if suffix_of(name) in CHECKPOINT_SUFFIXES or not name.isprintable():
            return False
        wanted = any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)
        return wanted or any(matches(item.path, glob) for glob in include)

    return is_copied
