"""From flat JSON-able values, as a command line or a deployment gives them, to one frozen options object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptbin.errors import UsageError
from ptbin.options import ConvertOptions

__all__ = ["MAX_WORKERS", "build_options"]

MAX_WORKERS = 64


def build_options(*, rename: Sequence[str] = (), drop: Sequence[str] = (), **others: Any) -> ConvertOptions:
    """`ConvertOptions` with `rename` written as `OLD=NEW`.

    Raises:
        UsageError: an unknown value, or a rename without `=`.
    """
    pairs = []
    for text in rename:
        old, equals, new = text.partition("=")
        if not equals or not old:
            raise UsageError(f"rename: {text!r} is not of the form OLD=NEW")
        pairs.append((old, new))
    return ConvertOptions(rename=tuple(pairs), drop=tuple(drop), **others)
