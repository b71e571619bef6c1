"""Which URI means which store.

Local paths need neither fsspec nor a network library; those are imported when the first URI asks for them,
because a small local conversion must start at once.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any

from ptbin.errors import UsageError
from ptbin.installed import require

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ptbin.stores.base import Store

    StoreFactory = Callable[[str, Mapping[str, Any]], tuple[Store, str]]

__all__ = ["open_store", "register_store"]

# RFC 3986 schemes, and fsspec's chains ("simplecache::s3://...").
_PROTOCOL = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:://|::)")

_factories: dict[str, StoreFactory] = {}


def open_store(uri: str, storage_options: Mapping[str, Any] | None = None) -> tuple[Store, str]:
    """The store that `uri` lies in, and its path there. Asks nothing of the store yet.

    Args:
        uri: a local path ("x/y", "/x/y", "~/x", "file:///x/y"), or any URL fsspec knows.
        storage_options: what fsspec's filesystem of that kind takes; never logged, never in messages.

    Raises:
        UsageError: an empty URI, an unknown protocol, or options the filesystem does not take.
    """
    if not uri:
        raise UsageError("an empty path or URI was given")
    options = storage_options or {}
    match = _PROTOCOL.match(uri)
    protocol = match.group(1).lower() if match else "file"
    if protocol in _factories:
        return _factories[protocol](uri, options)
    if protocol in ("file", "local"):
        return _open_local(uri[match.end() :] if match else uri)
    if protocol in ("s3", "s3a"):
        require("s3fs", f"{protocol}://")
        from ptbin.stores.s3 import open_s3

        return open_s3(uri, options)
    from ptbin.stores.fsspec_store import open_fsspec

    return open_fsspec(uri, options)


def register_store(protocol: str, factory: StoreFactory | None) -> None:
    """Let `factory(uri, storage_options)` open the URIs of `protocol` ("file": also plain paths).

    None takes a registration back. For stores of one's own, and for tests that count, slow or break one.
    """
    if factory is None:
        _factories.pop(protocol, None)
    else:
        _factories[protocol] = factory


def _open_local(path: str) -> tuple[Store, str]:
    from ptbin.stores.local import LocalStore

    return LocalStore(), os.path.abspath(os.path.expanduser(path))
