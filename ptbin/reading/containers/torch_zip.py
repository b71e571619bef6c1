"""torch's zip container (torch.save since 1.6) and TorchScript archives, which share its layout.

Members: `<root>/data.pkl` (the pickle), `<root>/data/<key>` (a storage each), `<root>/byteorder`,
`<root>/version`; a TorchScript archive has `<root>/constants.pkl` and `<root>/code/` besides.
Sources: torch/serialization.py (`_save`, `_load`), torch/csrc/jit/serialization/export_module.cpp.
"""

from __future__ import annotations

import re
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError
from ptbin.reading.containers.archives import read_zip_archive
from ptbin.reading.containers.checkpoint import Checkpoint, Opening
from ptbin.reading.containers.exported import read_exported
from ptbin.reading.containers.zip_directory import (
    DEFLATED,
    ZipDirectory,
    read_zip_directory,
    refuse_foreign_zip,
)
from ptbin.reading.pickle.interpreter import run_pickle
from ptbin.reading.pickle.old_tensors import parse_text_id
from ptbin.reading.pickle.torch_objects import storage_dtype
from ptbin.values.dtypes import DType
from ptbin.values.nodes import Global
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import ByteRange, Deflated, Storage, TypedStorage

__all__ = ["read_zip"]

# Members around the pickle that one request may bring along.
NEIGHBOUR_NBYTES = 256 * 1024

_CLASS = re.compile(r"^class (\w+)\(Module\):", re.MULTILINE)
_NAMES = re.compile(r"^  __(parameters|buffers)__ = \[([^\]\n]*)\]", re.MULTILINE)
_QUOTED = re.compile(r'"([^"\\]*)"')


def read_zip(opening: Opening) -> Checkpoint | None:
    """Index a zip archive: torch's, `torch.export`'s, or another one that holds checkpoints.

    Raises:
        NotACheckpointError, UnsupportedFormatError: a zip archive of another kind.
        CorruptArchiveError: records missing, of other sizes than the pickle says, or damaged.
    """
    if opening.file.head(4) != b"PK\x03\x04":
        return None
    directory = read_zip_directory(opening.file, opening.limits)
    root = _archive_root(directory)
    if root is None:
        exported = read_exported(opening, directory)
        if exported is not None:
            return exported
        inside = read_zip_archive(opening, directory)
        if inside is not None:
            return inside
        refuse_foreign_zip(directory)
        raise AssertionError("unreachable")
    _fetch_index(directory, root)
    big_endian = _is_big_endian(directory, root)
    storages: dict[str, Storage] = {}
    classes: dict[str, str] = {}
    dtypes: dict[Global, DType] = {}
    folder = "data"

    def persistent(pid: Any) -> TypedStorage:
        cls, key, numel = _storage_id(pid)
        dtype = dtypes.get(cls) if type(cls) is Global else None
        if dtype is None:
            dtype = dtypes[cls] = storage_dtype(cls)
        nbytes = numel * dtype.itemsize
        path = f"{folder}/{key}"
        known = storages.get(path)
        if known is None:
            place = _place(opening, directory, f"{root}/{path}", nbytes)
            known = storages[path] = Storage(key, nbytes, place, big_endian)
        if classes.setdefault(path, dtype.name) != dtype.name:
            # torch loads such a storage with the first type and reads every tensor through it
            raise CorruptArchiveError(f"{opening.file.uri}: storage {key!r} is given two element types")
        if known.nbytes != nbytes:
            raise CorruptArchiveError(
                f"{opening.file.uri}: storage {key!r} is {known.nbytes} "
                f"bytes in one place and {nbytes} in another"
            )
        return TypedStorage(known, dtype)

    checkpoint = Checkpoint(
        opening.file.uri,
        opening.file.size,
        "torch_zip",
        None,
        opening.programs,
        storages,
        opening.vocabulary,
        archive_root=root,
    )
    reducers = opening.vocabulary.reducers()
    name = f"{root}/data.pkl"
    raw = directory.read_member(name)
    program = run_pickle(
        raw,
        reducers=reducers,
        persistent=persistent,
        set_state=opening.vocabulary.set_state,
        limits=opening.limits,
        where=f"{opening.file.uri}: {name}",
    )
    if program.end != len(raw):
        program.oddities.append(f"{len(raw) - program.end} bytes behind the end of {name}")
    opening.programs.append(program)
    checkpoint.root = program.root
    _list_unnamed(checkpoint, directory, root)
    if f"{root}/constants.pkl" in directory.members:
        checkpoint.container = "torchscript"
        checkpoint.script_classes = _read_script_classes(directory, root)
    return checkpoint


def _list_unnamed(checkpoint: Checkpoint, directory: ZipDirectory, root: str) -> None:
    """Records that hold bytes of tensors and that the pickle does not name.

    Those of a TorchScript program's constants are known for what they are; they are no part of its state
    dict.
    """
    data, constants = f"{root}/data/", f"{root}/constants/"
    for name, member in directory.members.items():
        if name.startswith(data):
            if f"data/{name[len(data) :]}" not in checkpoint.storages:
                checkpoint.unnamed.append((name, member.header_offset, member.compressed_nbytes))
        elif name.startswith(constants):
            storage = Storage(name, member.compressed_nbytes)
            storage.place = ByteRange(member.header_offset, member.compressed_nbytes, member=name)
            constant = TypedStorage(storage, storage_dtype(Global("torch", "ByteStorage")))
            checkpoint.storages[f"constants/{name[len(constants) :]}"] = storage
            checkpoint.excluded.append(Excluded(name[len(root) + 1 :], "constant", node=constant))


def _archive_root(directory: ZipDirectory) -> str | None:
    """The folder that holds data.pkl; torch takes the first member's, so it must be the only one."""
    roots = [name[: -len("/data.pkl")] for name in directory.members if name.endswith("/data.pkl")]
    roots = [root for root in roots if "/" not in root]
    if not roots:
        return None
    first = next(iter(directory.members)).split("/", 1)[0]
    if len(roots) > 1 or roots[0] != first:
        raise CorruptArchiveError(
            f"{directory.file.uri}: pickles under {', '.join(roots[:4])}, "
            f"first member under {first}: loaders would disagree"
        )
    return roots[0]


def _fetch_index(directory: ZipDirectory, root: str) -> None:
    """Bring the pickle and its small neighbours in one request."""
    pickle = directory.members[f"{root}/data.pkl"]
    if pickle.nbytes > directory.limits.pickle_nbytes:
        raise LimitExceededError(
            f"{directory.file.uri}: a pickle of {pickle.nbytes} "
            f"bytes, the limit is {directory.limits.pickle_nbytes}"
        )
    end = pickle.next_offset
    for member in directory.members.values():
        near = member.next_offset - pickle.next_offset <= NEIGHBOUR_NBYTES
        if member.header_offset >= end and near and "/data/" not in member.name:
            end = member.next_offset
        elif member.header_offset >= end:
            break
    # Not everything up to the next member: between the two there may be anything.
    most = 30 + len(pickle.raw_name) + 0xFFFF + pickle.compressed_nbytes + NEIGHBOUR_NBYTES
    directory.file.fetch(pickle.header_offset, min(end - pickle.header_offset, most))


def _is_big_endian(directory: ZipDirectory, root: str) -> bool:
    if f"{root}/byteorder" not in directory.members:
        return False
    order = directory.read_member(f"{root}/byteorder")
    if order not in (b"little", b"big"):
        raise CorruptArchiveError(f"{directory.file.uri}: byte order {order[:20]!r}, expected little or big")
    return order == b"big"


def _storage_id(pid: Any) -> tuple[Any, str, int]:
    # ('storage', class, key, location, number of elements): torch/serialization.py, persistent_id
    if isinstance(pid, str):
        pid = parse_text_id(pid)
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
        raise CorruptArchiveError(f"a persistent id that is no storage: {type(pid).__name__}")
    key, numel = pid[2], pid[4]
    if isinstance(key, int):
        key = str(key)
    if not isinstance(key, str) or not key or type(numel) is not int or not 0 <= numel < 1 << 59:
        raise CorruptArchiveError("a storage id without key or element count")
    return pid[1], key, numel


def _place(opening: Opening, directory: ZipDirectory, name: str, nbytes: int) -> ByteRange | Deflated:
    uri = opening.file.uri
    member = directory.members.get(name)
    if member is None:
        raise CorruptArchiveError(f"{uri}: the pickle needs {name!r}, the archive has no such member")
    if member.nbytes != nbytes:
        raise CorruptArchiveError(
            f"{uri}: member {name!r} has {member.nbytes} bytes, the pickle says {nbytes}"
        )
    if member.data_offset is None:
        member = directory.locate(member)
        assert member.data_offset is not None
    crc = directory.crc32_of(member)
    if member.method == DEFLATED:
        if member.nbytes > opening.limits.inflate_ratio * member.compressed_nbytes + 64:
            raise LimitExceededError(
                f"{uri}: member {name!r} claims to inflate from "
                f"{member.compressed_nbytes} to {member.nbytes} bytes"
            )
        return Deflated(member.data_offset, member.compressed_nbytes, member.nbytes, crc, name)
    return ByteRange(member.data_offset, nbytes, crc, member.header_offset, name, member.closed)


def _read_script_classes(
    directory: ZipDirectory, root: str
) -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """Parameter and buffer names of every class in `code/`, which alone tells them from plain attributes."""
    classes: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    prefix = f"{root}/code/"
    total = 0
    for name in list(directory.members):
        if not (name.startswith(prefix) and name.endswith(".py")):
            continue
        total += directory.members[name].nbytes
        if total > directory.limits.code_nbytes:
            raise LimitExceededError(
                f"{directory.file.uri}: more than {directory.limits.code_nbytes} bytes of TorchScript code"
            )
        module = name[len(prefix) : -len(".py")].replace("/", ".")
        text = directory.read_member(name).decode("utf-8", "replace")
        starts = list(_CLASS.finditer(text))
        for index, match in enumerate(starts):
            end = starts[index + 1].start() if index + 1 < len(starts) else len(text)
            found = {
                kind: tuple(_QUOTED.findall(names)) for kind, names in _NAMES.findall(text[match.end() : end])
            }
            classes[f"{module}.{match[1]}"] = (found.get("parameters", ()), found.get("buffers", ()))
    return classes
