"""Files that belong to a Hugging Face model next to its weights: configuration, tokenizer, chat template.

Chosen by name, out of the source's folder or the `huggingface/` in it, where verl puts them. Code (`*.py`)
stays where it is: a folder that ptbin writes never makes anybody run some. Neither does a Git LFS pointer go
along, the few lines that lie in a file's place where `git lfs pull` has not been run: the output would look
whole. (One in a checkpoint's place is recognised by its container, `reading.containers.unreadable`.)
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable

from ptbin.errors import UnsupportedFormatError
from ptbin.sources.companions import is_sidecar
from ptbin.sources.opening import SourcePlace
from ptbin.stores import ListedObject, Place

HUGGING_FACE_FOLDER = "huggingface"
"""In a folder of rank files (verl's FSDP checkpoint manager, SkyRL)."""

MAX_NBYTES = 256 << 20
MAX_LISTED = 10_000


def find_sidecars(source: SourcePlace) -> dict[str, ListedObject]:
    """By their names those that lie in the source's folder, or in its `huggingface/`.

    What lies next to the weights comes first. A file's path is below the source's folder.
    """
    found: dict[str, ListedObject] = {}
    for item in itertools.islice(source.folder.iter_objects(), MAX_LISTED):
        name = item.path.removeprefix(f"{HUGGING_FACE_FOLDER}/")
        if "/" in name or not is_sidecar(name):
            continue
        if name.isprintable() and item.size <= MAX_NBYTES and (name == item.path or name not in found):
            found[name] = item
    return found


def change_of(name: str, dtype: str | None) -> Callable[[bytes], bytes] | None:
    """What a mirror that casts to `dtype` changes in a file of this name; None where it copies it as it is.

    Only the configuration of a model of transformers', and only its element type: there may be others of the
    name, and no weights next to them.
    """
    if name != "config.json" or dtype is None:
        return None

    def change(config: bytes) -> bytes:
        changed, _ = with_dtype(config, dtype)
        if changed == config or _DTYPE.search(config):
            return changed
        known = json.loads(config)
        return changed if "model_type" in known or "architectures" in known else config

    return change


# `torch_dtype` until transformers 4.55, `dtype` since (configuration_utils.py); either is read by both.
_DTYPE = re.compile(rb'("(?:torch_)?dtype"\s*:\s*)("[A-Za-z0-9_.]*"|null)')


def with_dtype(config: bytes, dtype: str) -> tuple[bytes, str]:
    """A model's `config.json` with its element type, and a note of what was changed; empty where nothing was.

    Nothing else of the text changes. One that is not a JSON object stays as it is.
    """
    try:
        known = json.loads(config)
    except (ValueError, RecursionError):
        known = None
    if not isinstance(known, dict):
        return config, ""
    value = json.dumps(dtype).encode()
    before = sorted({match[2].decode().strip('"') for match in _DTYPE.finditer(config)} - {dtype})
    if _DTYPE.search(config):
        changed = _DTYPE.sub(lambda match: match[1] + value, config)
    else:
        end = config.rindex(b"}")
        comma = b"," if known else b""
        changed = config[:end].rstrip() + comma + b'\n  "torch_dtype": ' + value + b"\n" + config[end:]
        before = ["nothing"]
    return (
        (changed, f"config.json says dtype {dtype}, in place of {', '.join(before)}")
        if before
        else (config, "")
    )


LFS_POINTER = b"version https://git-lfs"
MAX_POINTER_NBYTES = 1024
"""Git LFS, docs/spec.md: a pointer is shorter than that."""


def refuse_pointer(data: bytes, uri: str) -> None:
    """Raises UnsupportedFormatError where a file's content is a Git LFS pointer and not the file."""
    if len(data) <= MAX_POINTER_NBYTES and data.startswith(LFS_POINTER):
        raise UnsupportedFormatError(
            f"{uri}: a Git LFS pointer, not the file itself; run `git lfs pull` where it comes from"
        )


def refuse_pointer_at(place: Place, nbytes: int) -> None:
    """The same of a file that is still to be read: one read, and only where it is that small.

    Raises:
        UnsupportedFormatError: as `refuse_pointer`. StorageError: from the store.
    """
    if nbytes <= MAX_POINTER_NBYTES:
        refuse_pointer(place.read_bytes(limit=MAX_POINTER_NBYTES), place.uri)
