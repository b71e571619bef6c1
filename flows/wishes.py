"""From flat JSON-able values, as a command line or a deployment gives them, to one frozen options object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ptbin.errors import UsageError
from ptbin.options import ConvertOptions
from ptbin.stores import public_uri

__all__ = ["MAX_WORKERS", "build_options", "refuse_secrets"]

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


def refuse_secrets(*uris: str) -> None:
    """A flow's parameters are stored on Prefect's server and shown in its UI: no passwords in them.

    Raises:
        UsageError: a URI that carries a password or a signature.
    """
    for uri in uris:
        if public_uri(uri) != uri:
            raise UsageError(
                f"{public_uri(uri)} carries a password or a signature, which Prefect would show; "
                "give credentials as storage options"
            )
