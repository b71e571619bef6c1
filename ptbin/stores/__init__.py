"""The room that moves bytes: one `Store` for each kind of place, found by URI, and `Place`s in them.

place = place_of("s3://bucket/run1/last.ckpt", {"anon": True})
with place.open_reader() as reader: ...
"""

from __future__ import annotations

from ptbin.stores.base import Store, Watch, WatchQuietly
from ptbin.stores.faults import public_uri, refuse_secret
from ptbin.stores.place import NO_OPTIONS, Place, Sides, Where, open_store, place_of, register_store
from ptbin.stores.reader import RangeReader
from ptbin.stores.values import (
    PARTIAL_SUFFIX,
    Identity,
    ListedObject,
    ObjectStat,
    identity_text,
    is_partial_name,
)
from ptbin.stores.writer import CopyRefused, Writer

__all__ = [
    "NO_OPTIONS",
    "PARTIAL_SUFFIX",
    "CopyRefused",
    "Identity",
    "ListedObject",
    "ObjectStat",
    "Place",
    "RangeReader",
    "Sides",
    "Store",
    "Watch",
    "WatchQuietly",
    "Where",
    "Writer",
    "identity_text",
    "is_partial_name",
    "open_store",
    "place_of",
    "public_uri",
    "refuse_secret",
    "register_store",
]
