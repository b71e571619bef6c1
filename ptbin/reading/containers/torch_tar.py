"""torch's first container: a tar of `sys_info`, `pickle`, `tensors` and `storages` (before 0.1.10).

`storages` holds a count, for each storage a pickle of (key, location, class), an int64 element count and
the bytes, and at last a pickle of views: (key, key of the whole, offset, elements). `tensors` holds a
count, for each tensor a pickle of (key, storage's key, class), an int32 number of dimensions, four bytes
that mean nothing, and as int64 the sizes, strides and the offset. `pickle` refers to both by key. Source:
torch/serialization.py, `legacy_load`, which still reads such files.

Costs: a request of 64 KiB for each storage, as their sizes stand between them; `pickle` and `tensors`, which
hold no weights, one each.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from ptbin.errors import CorruptArchiveError, LimitExceededError
from ptbin.reading.containers.checkpoint import Checkpoint, Opening
from ptbin.reading.containers.legacy import run_pickle_at
from ptbin.reading.containers.source import EDGE_NBYTES, SourceFile, Window
from ptbin.reading.containers.tar import TarMember
from ptbin.reading.pickle.machine import PickleProgram
from ptbin.reading.pickle.storage_ids import storage_dtype
from ptbin.values.nodes import MAX_DIMENSIONS, Global
from ptbin.values.tensors import ByteRange, Storage, TensorRef, TypedStorage

_MEMBERS = frozenset(["sys_info", "pickle", "storages", "tensors"])


def is_torch_tar(members: Sequence[TarMember]) -> bool:
    return {member.name for member in members} >= _MEMBERS


def read_torch_tar(opening: Opening, members: Sequence[TarMember]) -> Checkpoint:
    """Index such a tar.

    Raises:
        CorruptArchiveError: its parts contradict each other.
        LimitExceededError: more storages or tensors than the limits allow.
    """
    by_name: dict[str, TarMember] = {}
    for member in members:
        if member.name in by_name:
            raise CorruptArchiveError(f"{opening.file.uri}: two members named {member.name!r}")
        by_name[member.name] = member
    reader = _Reader(opening, by_name)
    reader.read_storages()
    reader.read_tensors()
    program = reader.run(reader.part("pickle"), 0, "pickle", reader.persistent)
    others = [(m.name, m.nbytes) for m in members if m.name not in _MEMBERS]
    return opening.build("torch_tar", program.root, reader.storages, other_members=others)


class _Reader:
    def __init__(self, opening: Opening, members: dict[str, TarMember]) -> None:
        self._opening = opening
        self._members = members
        self.uri = opening.file.uri
        self.storages: dict[str, Storage] = {}
        self._objects: dict[int, TypedStorage | TensorRef] = {}

    def part(self, name: str, start: int = 0, ahead: int | None = None) -> Opening:
        """One member, from `start` on, as a file of which the first `ahead` bytes are read at once."""
        member = self._members[name]
        if start > member.nbytes:
            raise CorruptArchiveError(f"{self.uri}: {name} ends at byte {member.nbytes}; is it truncated?")
        nbytes = member.nbytes - start
        window = Window(self._opening.file, member.offset + start, nbytes, f"{self.uri}: {name}")
        file = SourceFile(window)
        file.fetch(0, min(nbytes, self._opening.limits.pickle_nbytes if ahead is None else ahead))
        return self._opening.another(file)

    def run(self, part: Opening, pos: int, what: str, persistent: Any = None) -> PickleProgram:
        """Run the pickle at `pos` of a member and keep it for the verdict."""
        program = run_pickle_at(part, pos, f"{self.uri}: {what}", persistent)
        self._opening.programs.append(program)
        return program

    def read_storages(self) -> None:
        base = self._members["storages"].offset
        count, pos = self._count(self.part("storages", 0, EDGE_NBYTES), "storages")
        for _ in range(count):
            # Their pickles stand between the weights: each is a request.
            part = self.part("storages", pos, EDGE_NBYTES)
            program = self.run(part, 0, "storages")
            key, _, kind = self._triple(program.root)
            dtype = storage_dtype(kind)
            (numel,) = struct.unpack("<q", part.file.read(program.end, 8, "element count"))
            nbytes = numel * dtype.itemsize
            if numel < 0 or program.end + 8 + nbytes > part.file.size:
                raise CorruptArchiveError(
                    f"{self.uri}: a storage of {numel} elements; is the file truncated?"
                )
            place = ByteRange(base + pos + program.end + 8, nbytes, member=f"storage {key}")
            storage = self.storages[str(key)] = Storage(str(key), nbytes, place)
            self._add(key, TypedStorage(storage, dtype))
            pos += program.end + 8 + nbytes
        views = self.run(self.part("storages", pos, EDGE_NBYTES), 0, "storage views").root
        if not isinstance(views, list):
            raise CorruptArchiveError(f"{self.uri}: the list of storage views is missing")
        for view in views:
            self._add_view(view)

    def _add_view(self, view: Any) -> None:
        if not isinstance(view, tuple) or len(view) != 4 or not all(type(n) is int for n in view):
            raise CorruptArchiveError(f"{self.uri}: a storage view of another form")
        key, whole_key, offset, numel = view
        whole = self._objects.get(whole_key)
        if not isinstance(whole, TypedStorage):
            raise CorruptArchiveError(f"{self.uri}: a view of a storage that is missing")
        end = (whole.view_offset + offset + numel) * whole.dtype.itemsize
        if offset < 0 or numel < 0 or end > whole.storage.nbytes:
            raise CorruptArchiveError(f"{self.uri}: a view that reaches beyond its storage")
        self._add(key, TypedStorage(whole.storage, whole.dtype, whole.view_offset + offset))

    def read_tensors(self) -> None:
        part = self.part("tensors")
        count, pos = self._count(part, "tensors")
        for _ in range(count):
            program = self.run(part, pos, "tensors")
            key, storage_key, _ = self._triple(program.root)
            storage = self._objects.get(storage_key) if type(storage_key) is int else None
            if not isinstance(storage, TypedStorage):
                raise CorruptArchiveError(f"{self.uri}: a tensor without its storage")
            (ndim,) = struct.unpack("<i", part.file.read(program.end, 4, "number of dimensions"))
            if not 0 <= ndim <= MAX_DIMENSIONS:
                raise CorruptArchiveError(f"{self.uri}: a tensor of {ndim} dimensions")
            # Four bytes are skipped: an older encoding gave the number of dimensions eight.
            raw = part.file.read(program.end + 8, 8 * (2 * ndim + 1), "tensor sizes")
            numbers = struct.unpack(f"<{2 * ndim + 1}q", raw)
            tensor = self._opening.vocabulary.tensor(
                storage, None, numbers[-1], numbers[:ndim], numbers[ndim:-1]
            )
            self._add(key, tensor)
            pos = program.end + 8 + len(raw)

    def persistent(self, pid: Any) -> Any:
        if isinstance(pid, tuple):
            # (class, source file, source text): the class as such
            if not pid or not isinstance(pid[0], Global):
                raise CorruptArchiveError(f"{self.uri}: a persistent id without a class")
            return pid[0]
        found = self._objects.get(int(pid)) if isinstance(pid, (int, str)) else None
        if found is None:
            raise CorruptArchiveError(f"{self.uri}: the pickle refers to {str(pid)[:40]!r}, which is missing")
        return found

    def _count(self, part: Opening, what: str) -> tuple[int, int]:
        program = self.run(part, 0, what)
        count = program.root
        if type(count) is not int or count < 0:
            raise CorruptArchiveError(f"{self.uri}: no number of {what}")
        if count > self._opening.limits.tensors:
            raise LimitExceededError(
                f"{self.uri}: {count} {what}, the limit is {self._opening.limits.tensors}", limit="tensors"
            )
        return count, program.end

    def _triple(self, value: Any) -> tuple[int, Any, Any]:
        if not isinstance(value, tuple) or len(value) != 3 or type(value[0]) is not int:
            raise CorruptArchiveError(f"{self.uri}: a storage or tensor is described in another form")
        return value[0], value[1], value[2]

    def _add(self, key: int, value: TypedStorage | TensorRef) -> None:
        if key in self._objects:
            raise CorruptArchiveError(f"{self.uri}: two objects with the key {key}")
        self._objects[key] = value
