"""Which files below SOURCE go along with the checkpoints of a mirror. Pure."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from ptbin.catalog.globs import matches
from ptbin.catalog.suffixes import CHECKPOINT_SUFFIXES, OTHER_SUFFIXES, suffix_of
from ptbin.sources.sidecars import PATTERNS
from ptbin.stores import ListedObject

COMPANIONS = (
    *PATTERNS,
    *("README*", "LICENSE*", "LICENCE*", "NOTICE*"),
    *("*.json", "*.txt", "*.md", "*.yaml", "*.yml", "*.toml", "*.jinja"),
)
"""Names of what belongs to models beside their weights, whatever the folder."""


@dataclass(frozen=True, slots=True)
class copied_along:  # noqa: N801 - called as a function, and asked as one
    """Says of a file below SOURCE whether it goes along as it is: a model's companion, or one of `include`.

    What by its name may be a checkpoint is one of them only where `include` says so, and then its content
    decides (`is_doubtful`).
    """

    include: Sequence[str] = ()

    def __call__(self, item: ListedObject) -> bool:
        """Whether this one goes along."""
        if _is_companion(item.path):
            return True
        return any(matches(item.path, glob) for glob in self.include)


def is_doubtful(item: ListedObject) -> bool:
    """Whether a file that is to go along may be a checkpoint: such are looked into, and converted."""
    return not _is_companion(item.path) and suffix_of(item.path.rpartition("/")[2]) not in OTHER_SUFFIXES


def _is_companion(path: str) -> bool:
    name = path.rpartition("/")[2]
    if is_sidecar(name):
        return True
    if suffix_of(name) in CHECKPOINT_SUFFIXES:
        return False
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in COMPANIONS)


def is_sidecar(name: str) -> bool:
    """Whether Hugging Face's libraries look for a file of this name beside a model's weights."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in PATTERNS)
