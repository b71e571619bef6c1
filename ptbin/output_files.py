"""The files of one output, each written, proven where it has no name yet, claimed and named.

Shards between local files are written side by side, on the cores that there are for this checkpoint. All else
goes one after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ptbin.cores import at_work, spare_cores
from ptbin.errors import VerificationError
from ptbin.manifests.draft import DraftFile
from ptbin.manifests.drafting import Written, draft_file, stored_of
from ptbin.manifests.vouching import OutputSite
from ptbin.options import ConvertOptions
from ptbin.proof.serial import Serial, serial_of
from ptbin.splice import RecordChecks, SpliceResult, check_copies, splice
from ptbin.stores import CopyRefused, RangeReader, identity_text
from ptbin.values.digests import FileDigests
from ptbin.values.segments import FilePlan

if TYPE_CHECKING:
    from ptbin.proof.written import WrittenProof

MAX_THREADS = 8

Progress = Callable[[int], None]


def write_files(
    plans: Sequence[FilePlan],
    reader: RangeReader,
    place: OutputSite,
    options: ConvertOptions,
    progress: Progress | None,
    notes: list[str],
) -> list[tuple[Written, DraftFile]]:
    """Write files to a place, in order or side by side; the result of each.

    Args:
        notes: gets what went another way than usual.

    Raises:
        as `splice` and the stores; of several at once, what the first of them raised.
    """
    naming = threading.Lock()
    replaces = place.manifest is not None
    checks = RecordChecks([file.plan for file in plans])

    def write(plan: FilePlan, progress: Progress | None) -> tuple[Written, DraftFile]:
        serial = serial_of(options.file_digest) if plan.tensors else "file"
        writing = _Writing(plan, reader, place, progress, options, serial, naming, checks)
        result, file, digests = writing.run(
            check_source=options.verify != "none", replaces=replaces, notes=notes
        )
        return (plan, result, digests), file

    threads = min(MAX_THREADS, len(plans), spare_cores())
    if threads < 2 or not reader.is_shareable or not place.place.is_local:
        return [write(plan, progress) for plan in plans]
    stopping = _Stopping(progress)
    with ThreadPoolExecutor(threads, thread_name_prefix="ptbin-shard") as pool:
        writing = [pool.submit(write, plan, stopping.report) for plan in plans]
        try:
            wait(writing, return_when=FIRST_EXCEPTION)
            for one in writing:
                if one.done():
                    one.result()
            return [one.result() for one in writing]
        except BaseException:
            stopping.stop()
            for one in writing:
                one.cancel()
            raise


class _Stopping:
    """Progress of several threads, reported one at a time; raises in all of them once one has failed."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self._lock = threading.Lock()
        self._stopped = False

    def stop(self) -> None:
        self._stopped = True

    def report(self, nbytes: int) -> None:
        if self._stopped:
            raise CancelledError
        if self._progress is not None:
            with self._lock:
                self._progress(nbytes)


@dataclass(frozen=True, slots=True)
class _Writing:
    """One file being written."""

    plan: FilePlan
    reader: RangeReader
    place: OutputSite
    progress: Progress | None
    options: ConvertOptions
    serial: Serial
    naming: threading.Lock
    checks: RecordChecks

    def run(
        self, *, check_source: bool, replaces: bool, notes: list[str]
    ) -> tuple[SpliceResult, DraftFile, FileDigests | None]:
        """What came of it, what the file must be, and its digests where it was proven under no name yet.

        Where it refuses to, everything is streamed through this process instead and `notes` says why.
        """
        try:
            return self._once(check_source, replaces, copies=True)
        except CopyRefused as refusal:
            notes.append(f"streamed, because the store did not copy: {refusal}")
            return self._once(check_source, replaces, copies=False)

    def _once(
        self, check_source: bool, replaces: bool, *, copies: bool
    ) -> tuple[SpliceResult, DraftFile, FileDigests | None]:
        plan = self.plan
        place = self.place.place_of(plan.name)
        opened = place.open_writer(size_hint=plan.plan.size, copies=copies, claim=self.place.claim)
        with at_work(), opened as writer:
            descriptor = writer.descriptor() if check_source else None
            proof = self._proof(descriptor) if descriptor is not None else None
            try:
                if proof is not None:
                    writer.reached, writer.step_nbytes = proof.reached, proof.step_nbytes
                result = splice(
                    plan.plan,
                    self.reader,
                    writer,
                    self.progress,
                    checks=self.checks,
                    check_source=check_source,
                    # A local file is proven before it gets its name, which shows a damaged source as well.
                    check_moved=proof is None,
                    # What a store copied is read when the output is proven. Before that only where a good
                    # output stands in its place: a damaged source must not replace it.
                    check_copied=check_source and replaces,
                )
                writer.settle()
                self.reader.confirm()
                file = draft_file(plan, result, writer.bytes_copied)
                digests = self._proven(proof, file) if proof is not None else None
                if (data := writer.held()) is not None and check_source:
                    digests = self._prove_held(data, file)
            except BaseException:
                if proof is not None:
                    proof.give_up()
                raise
            with self.naming:
                self.place.check(plan.name, plan.plan.size, result.crc32)
                self.place.withdraw_manifest((plan.name, plan.plan.size, result.crc32))
            writer.expected_crc32 = result.crc32
            writer.commit()
        if proof is None and not writer.acknowledged:
            digests = None  # what was sent is known, what was stored is not: it is read back
        acknowledged = digests is not None and writer.acknowledged
        file = replace(file, identity=identity_text(writer.identity) or None, acknowledged=acknowledged)
        if digests is not None and file.identity is not None:
            file = replace(file, sha256=digests.sha256, gaps_sha256=digests.gaps_sha256)
        return result, file, digests

    def _proof(self, descriptor: int) -> WrittenProof:
        from ptbin.proof.written import WrittenProof

        tensors = [(planned.name, stored_of(planned)) for planned in self.plan.tensors]
        uri = self.place.place.uri
        return WrittenProof(descriptor, self.plan.plan, tensors, uri, self.serial)

    def _prove_held(self, data: bytearray, file: DraftFile) -> FileDigests:
        from ptbin.proof.held import prove_held

        places = [stored_of(planned) for planned in self.plan.tensors]
        uri = self.place.place_of(self.plan.name).uri
        return prove_held(data, uri, file, self.plan, places, self.options, self.serial)

    def _proven(self, proof: WrittenProof, file: DraftFile) -> FileDigests:
        try:
            return proof.finish(file, self.progress)
        except VerificationError:
            # The source's own bytes may be what is wrong: then that is the answer.
            check_copies(self.plan.plan, self.reader)
            raise
