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
from ptbin.reading.pickle.machine import PickleProgram, PickleTruncatedError
from ptbin.reading.pickle.storage_ids import parse_text_id, storage_loader
from ptbin.values.nodes import DictNode, Global
from ptbin.values.tensors import ByteRange, Storage

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
    load = storage_loader(file.uri, storages, lambda key, nbytes: None)

    def persistent(pid: Any) -> Any:
        if isinstance(pid, str):
            pid = parse_text_id(pid)
        if isinstance(pid, tuple) and pid and pid[0] in ("module", b"module"):
            # ('module', class, source file, source text): the class as such
            if len(pid) < 2 or not isinstance(pid[1], Global):
                raise CorruptArchiveError(f"{file.uri}: a module id without a class")
            return pid[1]
        typed = load(pid)
        view = pid[5] if len(pid) > 5 else None
        if view is not None:
            # (view key, offset in elements, view size): a storage that was a slice of another
            is_view = isinstance(view, tuple) and len(view) == 3
            if not is_view or not all(type(n) is int and n >= 0 for n in view[1:]):
                raise CorruptArchiveError(
                    f"{file.uri}: storage {typed.storage.key!r} with view metadata of another form"
                )
            typed.view_offset = view[1]
        return typed

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
        # torch writes storages little-endian on every machine; it did not write this file.
        raise CorruptArchiveError(f"{file.uri}: a legacy file that says it is not little-endian")
    _place_storages(opening, keys.root, storages, pos)
    opening.programs.extend(programs)
    return opening.build("torch_legacy", body.root, storages)


def _place_storages(opening: Opening, keys: Any, storages: dict[str, Storage], pos: int) -> None:
    """Lay the storages out behind the pickles, in the order of the key list."""
    file = opening.file
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CorruptArchiveError(f"{file.uri}: the list of storage keys is missing")
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
    """Index a bare pickle; None where the content is not a pickle.

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
        raise NotACheckpointError(f"{file.uri}: neither a checkpoint container nor a pickle") from error
    if program.end != file.size:
        program.oddities.append(f"{file.size - program.end} bytes behind the end of the pickle")
    opening.programs.append(program)
    return opening.build("pickle", program.root, {})


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
            program = opening.run(data, where, persistent)
        except PickleTruncatedError:
            if end == file.size:
                raise
            window *= 8
            if window > limits.pickle_nbytes and end - pos >= limits.pickle_nbytes:
                raise LimitExceededError(
                    f"{where}: longer than {limits.pickle_nbytes} bytes", limit="pickle_nbytes"
                ) from None
            window = min(window, limits.pickle_nbytes)
            continue
        program.end += pos
        return program
