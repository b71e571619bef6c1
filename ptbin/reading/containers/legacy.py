"""torch's legacy container (torch.save before 1.6, or with the zip format switched off) and bare pickles.

A legacy file is a chain: magic number pickle, protocol pickle, system info pickle, object pickle,
list of storage keys, then for each key a little-endian int64 element count and the raw bytes. Source:
torch/serialization.py, `_legacy_save` and `_legacy_load`. The element counts are not read: the object
pickle states them too, and the file must end exactly where they say.

A bare pickle (`pickle.dump(state_dict)`) carries its storages as nested `torch.save` bytes.
"""

from __future__ import annotations

from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError, NotACheckpointError
from ptbin.reading.containers.checkpoint import Checkpoint, Opening
from ptbin.reading.pickle.interpreter import run_pickle
from ptbin.reading.pickle.machine import PickleProgram, PickleTruncatedError
from ptbin.reading.pickle.old_tensors import parse_text_id
from ptbin.reading.pickle.torch_objects import storage_dtype
from ptbin.values.nodes import DictNode, Global
from ptbin.values.tensors import ByteRange, Storage, TypedStorage

__all__ = ["looks_like_legacy", "read_legacy", "read_raw_pickle", "run_pickle_at"]

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C  # torch/serialization.py, MAGIC_NUMBER
PROTOCOL_VERSION = 1001
FIRST_WINDOW = 64 * 1024

# How the protocols write the magic number. From 2 on: PROTO, LONG1 of ten bytes, STOP; 0 and 1: decimal LONG.
_MAGIC_BYTES = b"\x8a\x0a" + MAGIC_NUMBER.to_bytes(10, "little")
_MAGIC_TEXT = b"L%dL\n." % MAGIC_NUMBER


def looks_like_legacy(head: bytes) -> bool:
    """Whether a file that begins so is a legacy container."""
    return _MAGIC_BYTES in head[:32] or head.startswith(_MAGIC_TEXT)


def read_legacy(opening: Opening) -> Checkpoint | None:
    """Index a legacy file; None where it does not begin with the magic number.

    Raises:
        CorruptArchiveError: the chain breaks, or the file does not end where its last storage does.
    """
    file = opening.file
    if not looks_like_legacy(file.head(32)):
        return None
    storages: dict[str, Storage] = {}
    classes: dict[str, str] = {}

    def persistent(pid: Any) -> Any:
        if isinstance(pid, str):
            pid = parse_text_id(pid)
        if isinstance(pid, tuple) and pid and pid[0] in ("module", b"module"):
            # ('module', class, source file, source text): the class as such
            if len(pid) < 2 or not isinstance(pid[1], Global):
                raise CorruptArchiveError(f"{file.uri}: a module id without a class")
            return pid[1]
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            raise CorruptArchiveError(f"{file.uri}: a persistent id that is no storage")
        key, numel = pid[2], pid[4]
        key = str(key) if isinstance(key, int) else key
        if not isinstance(key, str) or type(numel) is not int or not 0 <= numel < 1 << 59:
            raise CorruptArchiveError(f"{file.uri}: a storage id without key or element count")
        dtype = storage_dtype(pid[1])
        nbytes = numel * dtype.itemsize
        known = storages.setdefault(key, Storage(key, nbytes))
        if classes.setdefault(key, dtype.name) != dtype.name:
            raise CorruptArchiveError(f"{file.uri}: storage {key!r} is given two element types")
        if known.nbytes != nbytes:
            raise CorruptArchiveError(
                f"{file.uri}: storage {key!r} has two sizes, {known.nbytes} and {nbytes} bytes"
            )
        view = pid[5] if len(pid) > 5 else None
        offset = 0
        if view is not None:
            # (view key, offset in elements, view size): a storage that was a slice of another
            if (
                not isinstance(view, tuple)
                or len(view) != 3
                or not all(type(n) is int and n >= 0 for n in view[1:])
            ):
                raise CorruptArchiveError(f"{file.uri}: storage {key!r} with view metadata of another form")
            offset = view[1]
        return TypedStorage(known, dtype, offset)

    pos = 0
    programs: list[PickleProgram] = []
    for step in ("magic number", "protocol", "system info", "object", "storage keys"):
        program = run_pickle_at(opening, pos, f"{file.uri}: {step}", persistent if step == "object" else None)
        programs.append(program)
        pos = program.end
    magic, protocol, info, body, keys = programs
    if magic.root != MAGIC_NUMBER or protocol.root != PROTOCOL_VERSION:
        raise CorruptArchiveError(f"{file.uri}: another magic number or protocol than {PROTOCOL_VERSION}")
    if not isinstance(info.root, DictNode) or info.root.get("little_endian", True) is not True:
        # torch writes storages little-endian whatever the machine; such a file is not of its making.
        raise CorruptArchiveError(f"{file.uri}: a legacy file that says it is not little-endian")
    _place_storages(opening, keys.root, storages, pos)
    opening.programs.extend(programs)
    return Checkpoint(
        file.uri, file.size, "torch_legacy", body.root, opening.programs, storages, opening.vocabulary
    )


def _place_storages(opening: Opening, keys: Any, storages: dict[str, Storage], pos: int) -> None:
    """Lay the storages out behind the pickles, in the order of the key list."""
    file = opening.file
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CorruptArchiveError(f"{file.uri}: the list of storage keys is none")
    if len(set(keys)) != len(keys) or set(keys) != set(storages):
        raise CorruptArchiveError(
            f"{file.uri}: {len(keys)} storage keys listed, "
            f"{len(storages)} used by the pickle, and they differ"
        )
    for key in keys:
        storage = storages[key]
        storage.place = ByteRange(pos + 8, storage.nbytes, member=f"storage {key}")
        pos += 8 + storage.nbytes
    if pos != file.size:
        raise CorruptArchiveError(
            f"{file.uri}: the storages should end at byte {pos}, the file at {file.size}; is it truncated?"
        )


def read_raw_pickle(opening: Opening) -> Checkpoint | None:
    """Index a bare pickle; None where the content is no pickle.

    Raises:
        CorruptArchiveError: begins as a pickle of protocol 2 or later, and breaks.
    """
    file = opening.file
    head = file.head(2)
    binary = head[:1] == b"\x80" and len(head) > 1 and 2 <= head[1] <= 5
    if not binary and head[:1] not in (b"(", b"c", b"]", b"}", b")", b"i"):
        return None
    try:
        program = run_pickle_at(opening, 0, f"{file.uri}: pickle", None)
    except (CorruptArchiveError, LimitExceededError) as error:
        if binary:
            raise
        raise NotACheckpointError(f"{file.uri}: no checkpoint container, and no pickle either") from error
    if program.end != file.size:
        program.oddities.append(f"{file.size - program.end} bytes behind the end of the pickle")
    opening.programs.append(program)
    return Checkpoint(file.uri, file.size, "pickle", program.root, opening.programs, {}, opening.vocabulary)


def run_pickle_at(opening: Opening, pos: int, where: str, persistent: Any) -> PickleProgram:
    """Run the pickle at `pos`, reading more of the file as long as the pickle wants more."""
    file, limits = opening.file, opening.limits
    window = FIRST_WINDOW
    mark, programs = opening.vocabulary.mark(), len(opening.programs)
    while True:
        opening.vocabulary.rewind(mark)  # arrays of a run that broke off would be counted twice
        del opening.programs[programs:]
        end = min(file.size, pos + window)
        data = file.read(pos, end - pos, "pickle")
        try:
            program = run_pickle(
                data,
                reducers=opening.vocabulary.reducers(),
                persistent=persistent,
                set_state=opening.vocabulary.set_state,
                limits=limits,
                where=where,
            )
        except PickleTruncatedError:
            if end == file.size:
                raise
            window *= 8
            if window > limits.pickle_nbytes and end - pos >= limits.pickle_nbytes:
                raise LimitExceededError(f"{where}: longer than {limits.pickle_nbytes} bytes") from None
            window = min(window, limits.pickle_nbytes)
            continue
        program.end += pos
        return program
