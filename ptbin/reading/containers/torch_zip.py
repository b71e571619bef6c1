"""torch's zip container (torch.save since 1.6) and TorchScript archives, which share its layout.

Members: `<root>/data.pkl` (the pickle), `<root>/data/<key>` (a storage each), `<root>/byteorder`,
`<root>/version`; a TorchScript archive also has `<root>/constants.pkl` and `<root>/code/`.
Sources: torch/serialization.py (`_save`, `_load`), torch/csrc/jit/serialization/export_module.cpp.
"""

from __future__ import annotations

import re

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
from ptbin.reading.pickle.storage_ids import storage_dtype, storage_loader
from ptbin.values.nodes import Global
from ptbin.values.state_dict import Excluded
from ptbin.values.tensors import ByteRange, Deflated, Storage, TypedStorage

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
    storages: dict[str, Storage] = {}
    load = storage_loader(
        opening.file.uri,
        storages,
        lambda path, nbytes: _place(opening, directory, f"{root}/{path}", nbytes),
        folder="data/",
        big_endian=_is_big_endian(directory, root),
    )
    name = f"{root}/data.pkl"
    program = opening.run_whole(directory.read_member(name), name, f"{opening.file.uri}: {name}", load)
    checkpoint = opening.build("torch_zip", program.root, storages, archive_root=root)
    _list_unnamed(checkpoint, directory, root)
    if f"{root}/constants.pkl" in directory.members:
        checkpoint.container = "torchscript"
        checkpoint.script_classes = _read_script_classes(directory, root)
    return checkpoint


def _list_unnamed(checkpoint: Checkpoint, directory: ZipDirectory, root: str) -> None:
    """Records that hold bytes of tensors and that the pickle does not name.

    Those of a TorchScript program's constants are known for what they are; they are not part of its state
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
            f"bytes, the limit is {directory.limits.pickle_nbytes}",
            limit="pickle_nbytes",
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


def _place(opening: Opening, directory: ZipDirectory, name: str, nbytes: int) -> ByteRange | Deflated:
    uri = opening.file.uri
    member = directory.members.get(name)
    if member is None:
        raise CorruptArchiveError(f"{uri}: the pickle needs {name!r}, the archive has no such member")
    if member.nbytes != nbytes:
        raise CorruptArchiveError(
            f"{uri}: member {name!r} has {member.nbytes} bytes, the pickle says {nbytes}"
        )
    offset, crc = directory.data_offset_of(member), directory.crc32_of(member)
    if member.method == DEFLATED:
        if member.nbytes > opening.limits.inflate_ratio * member.compressed_nbytes + 64:
            raise LimitExceededError(
                f"{uri}: member {name!r} claims to inflate from "
                f"{member.compressed_nbytes} to {member.nbytes} bytes"
            )
        return Deflated(offset, member.compressed_nbytes, member.nbytes, crc, name)
    return ByteRange(offset, nbytes, crc, member.header_offset, name, member.closed)


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
                f"{directory.file.uri}: more than {directory.limits.code_nbytes} bytes of TorchScript code",
                limit="code_nbytes",
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
