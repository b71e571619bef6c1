"""Named files below SOURCE, asked for one by one instead of listed: a few of them among a million.

Costs a request for each; no listing. Only for plain files: a part of a checkpoint, and a folder, stand for
more than themselves, and what that is, a listing tells.
"""

from __future__ import annotations

from collections.abc import Iterable

from ptbin.errors import NotFoundInStoreError, StorageError
from ptbin.sources.folders import is_folder_part
from ptbin.stores import ListedObject, Place
from ptbin.values.names import is_plain_path

MAX_ASKED = 200
"""More than these are as soon listed: a page of a listing holds a thousand."""


def ask_for_named(root: Place, paths: Iterable[str]) -> list[ListedObject] | None:
    """The named files that are there, in the order of a listing; None: it takes one to find them.

    Raises:
        StorageError: the store failed.
    """
    wanted = sorted(set(paths), key=lambda path: path.encode("utf-8", "surrogateescape"))
    if len(wanted) > MAX_ASKED or any(not _is_plain(path) for path in wanted):
        return None
    found = []
    for path in wanted:
        place = root / path
        try:
            stat = place.stat()
        except NotFoundInStoreError:
            if place.is_directory():
                return None
            continue
        except StorageError:
            return None  # a folder, or something that the listing has a word for
        found.append(ListedObject(path, stat.uri, stat.size, stat.identity))
    return found


def _is_plain(path: str) -> bool:
    """Whether it can only be a file by itself, below SOURCE; `..` leads elsewhere on some stores."""
    return is_plain_path(path) and not is_folder_part(path.rpartition("/")[2])
