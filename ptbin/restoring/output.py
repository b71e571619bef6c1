"""The restored file while it is made: where child processes write and read it, its content, its publication.

A local output is written where it will lie, without a name, and gets the name when it is proven; for another
store it is written to the temporary folder and sent from there. Its SHA-256 is made while it is written
(`following`), those of its tensors afterwards on all cores, with the CRC-32 of each record.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ptbin.conversion import Progress
from ptbin.errors import CheckpointError, VerificationError
from ptbin.manifests.manifest import hex_crc32, utc_now
from ptbin.manifests.vouching import OutputSite
from ptbin.options import ConvertOptions
from ptbin.proof.digests import digest_descriptor
from ptbin.proof.regions import sha256_of_tensor
from ptbin.reading.containers import read_checkpoint
from ptbin.reading.containers.checkpoint import as_checkpoint_errors
from ptbin.reading.pickle.verdicts import judge_programs
from ptbin.reading.selected import select_from
from ptbin.reading.tree import iter_data
from ptbin.restoring.facts import Facts, View, view_of
from ptbin.restoring.following import FollowedFile, sha256_of
from ptbin.restoring.options import RestoreOptions
from ptbin.stores import Place, Writer, identity_text
from ptbin.values.digests import FileDigests, StoredTensor
from ptbin.values.state_dict import iter_tensors
from ptbin.values.tensors import ByteRange, TensorRef

CHUNK_NBYTES = 4 << 20
_SUFFIXES = {"exported": ".pt2"}
"""Suffixes that torch asks for."""


class Output:
    """Made by `begin`. A child writes it; then `begin_hashing`, `wait`, `rows`, `publish`, in this order."""

    def __init__(self, at: OutputSite, writer: Writer, link: Path, descriptor: int, *, lent: bool) -> None:
        self._at, self._writer, self._lent = at, writer, lent
        self.link = link
        """The path by which children reach it."""
        self._descriptor = descriptor
        self._followed: FollowedFile | None = None
        self._hashing: Future[None] | None = None
        self._tensors: list[tuple[str, TensorRef]] = []
        self._nameless: list[TensorRef] = []
        self._digests = FileDigests()
        self._crc32s: dict[int, tuple[int, int]] = {}

    @classmethod
    @contextlib.contextmanager
    def begin(
        cls, at: OutputSite, folder: Path, options: RestoreOptions, progress: Progress | None
    ) -> Iterator[Output]:
        # torch calls an archive's top folder after the file it writes to: one name, whatever DEST is called.
        link = folder / ("restored" + _SUFFIXES.get(options.form, ".pt"))
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(at.place.open_writer(copies=False, claim=at.claim))
            descriptor = writer.descriptor()
            lent = descriptor is not None
            if descriptor is not None:
                link.symlink_to(f"/proc/self/fd/{descriptor}")
            else:
                descriptor = os.open(link, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
                stack.callback(os.close, descriptor)
            out = cls(at, writer, link, descriptor, lent=lent)
            out._follow(stack, progress)
            yield out

    def _follow(self, stack: contextlib.ExitStack, progress: Progress | None) -> None:
        reached = 0

        def arrived(position: int) -> None:
            nonlocal reached
            if self._lent:
                self._writer.flush_up_to(position)
            if progress is not None:
                progress(position - reached)
            reached = position

        self._followed = FollowedFile(self._descriptor, arrived)
        stack.callback(self._followed.close)

    @property
    def passed(self) -> tuple[int, ...]:
        """Descriptors that a child needs."""
        return (self._descriptor,) if self._lent else ()

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def begin_hashing(self, stack: contextlib.ExitStack) -> None:
        """The file is written: index it and hash what is in it, on threads that `stack` ends."""
        assert self._followed is not None
        self._followed.complete()
        pool = stack.enter_context(ThreadPoolExecutor(1))
        self._hashing = pool.submit(self._hash)

    def _hash(self) -> None:
        records: dict[tuple[int, int], int | None] = {}
        # What ptbin does not read in it has no rows; its tensors are compared all the same.
        with contextlib.suppress(CheckpointError), as_checkpoint_errors(_Stored.uri):
            options = ConvertOptions(on_unsafe="extract")
            checkpoint = read_checkpoint(_Stored(self._descriptor, self.size), options.limits)
            for storage in checkpoint.storages.values():
                if isinstance(storage.place, ByteRange) and storage.nbytes:
                    records[storage.place.offset, storage.nbytes] = storage.place.crc32
            self._nameless = [data for data in iter_data(checkpoint.root) if isinstance(data, TensorRef)]
            selected = select_from(checkpoint, judge_programs(checkpoint.programs), options)
            self._tensors = [
                (label, tensor)
                for label, tensor in iter_tensors(selected.state_dict.entries)
                if isinstance(tensor.storage.place, ByteRange)
            ]
            self._nameless = []
        self._nameless = [t for t in self._nameless if isinstance(t.storage.place, ByteRange)]
        places = [StoredTensor.of(tensor) for tensor in (*(t for _, t in self._tensors), *self._nameless)]
        self._digests = digest_descriptor(
            self._descriptor, self.size, records, places, None, _ended, serial="nothing"
        )
        for (offset, nbytes), stated in records.items():
            found = self._digests.records[offset, nbytes]
            if stated is not None and found != stated:
                raise VerificationError(
                    f"the restored file has CRC-32 {hex_crc32(found)} at byte {offset}, "
                    f"torch wrote {hex_crc32(stated)}"
                )
            self._crc32s[offset] = (nbytes, found)

    def wait(self) -> None:
        """Until all is hashed.

        Raises:
            VerificationError: a record is not what torch wrote.
        """
        assert self._hashing is not None
        self._hashing.result()

    def crc32_at(self, offset: int) -> tuple[int, int] | None:
        """Size and CRC-32 of the record whose bytes begin at `offset`."""
        return self._crc32s.get(offset)

    def sha256_of(self, view: View) -> str:
        place = view.stored()
        if place not in self._digests.tensors:
            self._digests.tensors[place] = sha256_of_tensor(place, self._pieces)
        return self._digests.tensors[place]

    def rows(self, source_names: Mapping[str, str], facts: Facts) -> list[dict[str, Any]]:
        """Of the manifest, for the tensors that ptbin's own reader finds in the file.

        Where it finds them without names, as in quantized layers, which only their own code takes apart,
        `facts` have the names: what a fresh process has found under each.
        """
        named = self._tensors or self._named(facts)
        return [self._row(label, tensor, source_names.get(label, label)) for label, tensor in named]

    def _named(self, facts: Facts) -> list[tuple[str, TensorRef]]:
        by_content: dict[tuple[Any, ...], TensorRef] = {}
        for tensor in self._nameless:
            sha256 = self._digests.tensors[StoredTensor.of(tensor)]
            by_content.setdefault((tensor.dtype.name, tensor.shape, sha256), tensor)
        found = []
        for label, fact in facts.items():
            view = view_of(fact)
            sha256 = fact[2] if view is None else self.sha256_of(view)
            known = by_content.get((fact[0].partition(" ")[0], tuple(fact[1]), sha256))
            if known is not None and not label.endswith((" (buffer)", " (attribute)")):
                found.append((label, known))
        return found

    def _row(self, label: str, tensor: TensorRef, source_name: str) -> dict[str, Any]:
        place = StoredTensor.of(tensor)
        row: dict[str, Any] = {
            "name": label,
            "source_name": source_name,
            "dtype": tensor.dtype.name,
            "shape": list(tensor.shape),
            "nbytes": tensor.nbytes,
            "file": self._name,
            "offset": place.offset,
            "sha256": self._digests.tensors[place],
        }
        if place.stride is not None:
            row["stride"] = list(place.stride)
        if tensor.flags:
            row["lazy"] = list(tensor.flags)
        return row

    @property
    def _name(self) -> str:
        return self._at.place.name

    def publish(self, manifest: dict[str, Any]) -> None:
        """Give the file its place, its manifest last. `manifest` has its tensors and gets the rest."""
        assert self._followed is not None
        crc32, size = self._digests.crc32, self.size
        sha256 = self._followed.sha256()
        if self._followed.crc32 != crc32:
            sha256 = sha256_of(self._descriptor)
        if self._lent:
            self._writer.take_back()
        else:
            for piece in self._pieces(0, size):
                self._writer.write(piece)
        tensors, manifest["tensors"] = manifest["tensors"], []
        output = {"path": self._name, "size": size, "sha256": sha256, "crc32": hex_crc32(crc32)}
        manifest["outputs"] = [output]
        manifest["finished_at"] = utc_now()
        manifest["bytes_written"] = size
        manifest["bytes_copied_in_store"] = 0
        manifest["verification"] = {"level": "load", "status": "verified", "at": utc_now()}
        self._at.check(self._name, size, crc32)
        self._at.withdraw_manifest((self._name, size, crc32))
        self._writer.commit()
        if seen := identity_text(self._writer.identity):
            manifest["verification"]["identities"] = {self._name: seen}
        if not self._lent:
            _read_back(self._at.place, sha256)
        manifest["tensors"] = tensors
        self._at.write_manifest(manifest)

    def _pieces(self, offset: int, nbytes: int) -> Iterator[bytes]:
        end = offset + nbytes
        while offset < end:
            piece = os.pread(self._descriptor, min(CHUNK_NBYTES, end - offset), offset)
            if not piece:
                _ended(offset, end - offset)
            yield piece
            offset += len(piece)


class _Stored:
    """The file, for the reading room (`reading.source.RandomReader`)."""

    uri = "the restored file"

    def __init__(self, descriptor: int, size: int) -> None:
        self._descriptor = descriptor
        self.size = size

    def read(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._descriptor, nbytes, offset)


def _ended(offset: int, nbytes: int) -> bytes:
    raise VerificationError(f"the restored file ends before byte {offset + nbytes}")


def _read_back(place: Place, wanted: str) -> None:
    digest = hashlib.sha256()
    with place.open_reader() as reader:
        for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
            digest.update(piece)
    if digest.hexdigest() != wanted:
        place.delete()
        raise VerificationError(f"{place.uri}: what is stored is not what was written")
