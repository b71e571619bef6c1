"""Whether a store takes names that differ only in case for one file.

Object stores do not. Of local file systems the nearest folder that exists is asked by its own name, written
in the other case; that costs a look or two, and writes nothing.
"""

from __future__ import annotations

import os

from ptbin.stores import Store

FOLDING_PROTOCOLS = frozenset({"smb"})
"""Of servers that keep names apart or not, mostly not; others are taken at their word, as Unix has it."""


def folds_case(store: Store, path: str) -> bool:
    """Whether `README` and `readme` would be one file in or below `path`."""
    if store.protocol != "file":
        return store.protocol in FOLDING_PROTOCOLS
    folder = path
    while folder not in ("", "/"):
        other = os.path.join(os.path.dirname(folder), os.path.basename(folder).swapcase())
        if os.path.lexists(folder) and other != folder:
            return os.path.exists(other) and os.path.samefile(folder, other)
        folder = os.path.dirname(folder)
    return False
