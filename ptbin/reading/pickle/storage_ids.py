"""The persistent ids by which torch's pickles name storages.

An id is `('storage', class, key, location, number of elements)`, and in files of before 1.6 a view behind it
(torch/serialization.py, `persistent_id`). Knows no container: where a storage lies is the caller's to say.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from ptbin.errors import CorruptArchiveError, UnsupportedFormatError
from ptbin.values.dtypes import BY_STORAGE_CLASS, DType
from ptbin.values.nodes import Global
from ptbin.values.tensors import Place, Storage, TypedStorage

MAX_ELEMENTS = 1 << 59

# How protocol 0 writes a persistent id: `str` of the tuple (CPython, Lib/pickle.py, `save_pers`).
_TEXT_ID = re.compile(
    r"\('storage', <class '([\w.]+)\.(\w+)'>, '([^'\\]+)', '[^'\\]*', (\d{1,18})"
    r"(?:, (?:None|\('([^'\\]+)', (\d{1,18}), (\d{1,18})\)))?\)"
)


def parse_text_id(text: str) -> tuple[Any, ...]:
    """The persistent id of a storage in a pickle of protocol 0, which torch writes and cannot read itself.

    Raises:
        UnsupportedFormatError: an id of another kind.
    """
    match = _TEXT_ID.fullmatch(text)
    if match is None:
        raise UnsupportedFormatError(
            f"a pickle of protocol 0 that refers to {text[:80]!r}, which protocol 0 writes as mere text; "
            "save it again with torch.save and its default protocol"
        )
    module, name, key, numel, view_key, offset, view_numel = match.groups()
    view = None if view_key is None else (view_key, int(offset), int(view_numel))
    return ("storage", Global(module, name), key, None, int(numel), view)


def storage_dtype(kind: Any) -> DType:
    """Element type behind a storage class as a persistent id names it; untyped storages count bytes.

    Raises:
        ValueError: not a storage class.
    """
    if not isinstance(kind, Global):
        raise ValueError("a storage class that is not a global")
    name = kind.name.rsplit(".", 1)[-1]
    if kind.module in ("torch.storage", "torch") and name in ("UntypedStorage", "_UntypedStorage"):
        return BY_STORAGE_CLASS["ByteStorage"]
    dtype = BY_STORAGE_CLASS.get(name)
    if dtype is None or kind.module.split(".")[0] != "torch":
        raise ValueError(f"{kind.path} is not a storage class")
    return dtype


def storage_loader(
    uri: str,
    storages: dict[str, Storage],
    place_of: Callable[[str, int], Place | None],
    *,
    folder: str = "",
    big_endian: bool = False,
) -> Callable[[Any], TypedStorage]:
    """The `persistent_load` of a file: a storage's id to the storage, the same one for every id of its key.

    Args:
        storages: takes up each new storage, by `folder` and its key.
        place_of: where the storage of that name and size lies; None where the container has still to say.
    """
    types: dict[str, str] = {}
    dtypes: dict[Global, DType] = {}

    def load(pid: Any) -> TypedStorage:
        if isinstance(pid, str):
            pid = parse_text_id(pid)
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            raise CorruptArchiveError(
                f"{uri}: a persistent id that is not a storage's: a {type(pid).__name__}"
            )
        kind, key, numel = pid[1], pid[2], pid[4]
        if isinstance(key, int):
            key = str(key)
        if not isinstance(key, str) or not key or type(numel) is not int or not 0 <= numel < MAX_ELEMENTS:
            raise CorruptArchiveError(f"{uri}: a storage id without key or element count")
        dtype = dtypes.get(kind) if type(kind) is Global else None
        if dtype is None:
            dtype = dtypes[kind] = storage_dtype(kind)
        nbytes = numel * dtype.itemsize
        name = folder + key
        known = storages.get(name)
        if known is None:
            known = storages[name] = Storage(key, nbytes, place_of(name, nbytes), big_endian)
        if types.setdefault(name, dtype.name) != dtype.name:
            # torch loads such a storage with the first type and reads every tensor through it
            raise CorruptArchiveError(f"{uri}: storage {key!r} is given two element types")
        if known.nbytes != nbytes:
            raise CorruptArchiveError(
                f"{uri}: storage {key!r} is {known.nbytes} bytes in one place and {nbytes} in another"
            )
        return TypedStorage(known, dtype)

    return load
