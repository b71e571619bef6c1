"""One S3 object written in order: a single PUT where it is small, else a multipart upload.

Nothing is visible before `commit`. What lies in the same store already is not sent again: `lay_out` cuts the
output into parts (`parts`), and `copy_from` has the store copy those that are ranges of another object, each
pinned to the state of that object that the reader saw. Up to `UPLOADS` parts are under way while the next
one fills (40 MiB of memory for objects up to 80 GiB, 5 parts' worth above), and up to `COPIES` copies.
A failed upload is aborted; its parts would else be paid for, for ever, without being seen.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import time
import zlib
from collections import deque
from collections.abc import Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ptbin.errors import (
    AccessDeniedError,
    NotFoundInStoreError,
    PtbinError,
    SourceChangedError,
    StorageError,
)
from ptbin.stores.base import MIB, CopyRefused, Identity, Writer
from ptbin.stores.parts import Part, PartRules, Stretch, plan_parts
from ptbin.stores.s3_reader import S3Reader, etag_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from concurrent.futures import Future

    from ptbin.stores.base import RangeReader
    from ptbin.stores.s3_client import S3Client

__all__ = ["S3Writer", "part_nbytes_for"]

RULES = PartRules()
UNKNOWN_SIZE_PART_NBYTES = 32 * MIB
"""Where no size is foretold: room for 312 GiB."""
UPLOADS = 4
COPIES = 8
CLOCK_STEP_S = 2.0
"""S3 states times in whole seconds."""
ABORT_WAIT_S = 15.0
"""So long parts under way may hold up an abort: a server that hangs must not hold up the end of a run."""
LEAST_COPIED_NBYTES = 8 * MIB
"""An output with less to copy is streamed: that takes fewer requests and no more time."""


def part_nbytes_for(size_hint: int | None) -> int:
    """The part size, whole mebibytes, with which `size_hint` bytes fit into one upload."""
    if size_hint is None:
        return UNKNOWN_SIZE_PART_NBYTES
    needed = -(-size_hint // RULES.max_parts)
    return min(RULES.max_nbytes, max(RULES.upload_nbytes, -(-needed // MIB) * MIB))


@dataclass(frozen=True, slots=True)
class _Sent:
    """A part that the store has: its ETag, and its CRC-32 where that is asked for at the end."""

    etag: str
    crc32: str | None = None


class S3Writer(Writer):
    """Made by `S3Store.open_writer`; asks nothing of the store before the first part is full."""

    def __init__(
        self, client: S3Client, uri: str, *, bucket: str, key: str, size_hint: int | None, copies: bool
    ) -> None:
        super().__init__(uri)
        self._client = client
        self._object = {"Bucket": bucket, "Key": key}
        self._copies = copies
        self._part_nbytes = part_nbytes_for(size_hint)
        self._sizes: deque[int] = deque()  # of the parts to be uploaded, where they were laid out
        self._filling = bytearray()
        self._filled = 0
        self._upload_id: str | None = None
        self._beginning: Future[str] | None = None
        self._lost_creates = 0
        self._creating_s = 0.0
        self._sent: list[_Sent] = []
        self._under_way: deque[tuple[bool, Future[_Sent]]] = deque()

    # -- bytes that come from here -------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            if self._filled == self._part_nbytes:  # only now is it certain that more follows
                self._send_part()
            if not self._filling:
                self._filling = bytearray(self._part_nbytes)
            taken = rest[: self._part_nbytes - self._filled]
            self._filling[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            self.bytes_written += len(taken)
            rest = rest[len(taken) :]

    def _send_part(self) -> None:
        number = self._next_number()
        part = self._taken()
        if self._sizes:
            self._part_nbytes = self._sizes.popleft()
        self._submit(UPLOADS, lambda: self._upload_part(number, part), copied=False)

    def _taken(self) -> bytearray:
        """What has been gathered so far, which is then forgotten here."""
        part, self._filling = self._filling, bytearray()
        del part[self._filled :]
        self._filled = 0
        return part

    def _next_number(self) -> int:
        number = len(self._sent) + len(self._under_way) + 1
        if number > RULES.max_parts:
            raise StorageError(
                f"cannot write {self.uri}: more than {RULES.max_parts} parts of {self._part_nbytes} bytes; "
                "it grew beyond the size that was foretold"
            )
        self._begin()
        return number

    def _submit(self, most: int, work: Callable[[], _Sent], *, copied: bool) -> None:
        """Start a part; wait before for the oldest ones while too many of its kind are under way."""
        while sum(kind is copied for kind, _ in self._under_way) >= most:
            self._collect()

        def unless_aborted() -> _Sent:
            if not self._open:
                raise StorageError(f"the upload of {self.uri} was given up")
            return work()

        self._under_way.append((copied, self._client.start(lambda: self._client.repeated(unless_aborted))))

    def _collect(self) -> None:
        _, future = self._under_way.popleft()
        self._sent.append(future.result())

    def _begin(self) -> None:
        if self._beginning is None:
            # On another thread: an interrupt here must not lose an upload that the store has begun.
            self._beginning = self._client.start(self._create_upload)
        self._upload_id = self._beginning.result()

    def _create_upload(self) -> str:
        """Begin the upload; with copies in it, ask the store to keep a CRC-32 of the whole object."""
        started = time.monotonic()
        asked: dict[str, str] = {}
        if self._moves:
            asked = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
        try:
            answer = self._create(asked)
        except StorageError as error:
            if not asked or error.transient or isinstance(error, (AccessDeniedError, NotFoundInStoreError)):
                raise
            answer = self._create({})
        if self._lost_creates:
            self._creating_s = time.monotonic() - started
        # A store that knows nothing of checksums drops the wish without a word.
        self.checks_crc32 = bool(asked) and answer.get("ChecksumAlgorithm") == "CRC32"
        return str(answer["UploadId"])

    def _create(self, asked: Mapping[str, str]) -> dict[str, Any]:
        def once() -> dict[str, Any]:
            try:
                return self._client.attempt(
                    "create_multipart_upload", "write", self.uri, **self._object, **asked
                )
            except StorageError as error:
                self._lost_creates += error.transient
                raise

        return self._client.repeated(once)

    def _abort_lost(self, own: str) -> None:
        """Abort uploads that were begun here without our hearing of it: the answer was lost on its way.

        They are known by their key, by having been begun within the time that our attempts took, and by
        having no part. Another writer to the same key that has not sent its first part by now could be hit;
        it would fail and try again, and nothing be stored wrongly.
        """
        found = self._client.call(
            "list_multipart_uploads",
            "write",
            self.uri,
            Bucket=self._object["Bucket"],
            Prefix=self._object["Key"],
        ).get("Uploads", ())
        begun = {item["UploadId"]: item["Initiated"] for item in found if item["Key"] == self._object["Key"]}
        if own not in begun:
            return
        latest = begun.pop(own)
        earliest = latest - timedelta(seconds=self._creating_s + CLOCK_STEP_S)
        for upload_id, initiated in begun.items():
            named = {**self._object, "UploadId": upload_id}
            if earliest <= initiated <= latest and not self._client.call(
                "list_parts", "write", self.uri, **named, MaxParts=1
            ).get("Parts"):
                self._client.call("abort_multipart_upload", "abort the upload of", self.uri, **named)

    def _upload_part(self, number: int, part: bytearray) -> _Sent:
        checksum = {"ChecksumCRC32": _base64(zlib.crc32(part))} if self.checks_crc32 else {}
        answer = self._client.attempt(
            "upload_part",
            "write",
            self.uri,
            **self._object,
            **checksum,
            UploadId=self._upload_id,
            PartNumber=number,
            Body=part,
        )
        return _Sent(str(answer["ETag"]), checksum.get("ChecksumCRC32"))

    # -- bytes that the store has --------------------------------------------------------------

    _moves = False

    def moves_from(self, reader: RangeReader) -> bool:
        return self._copies and reader.server_side_store is not None and self._reaches(reader)

    def _reaches(self, reader: RangeReader) -> bool:
        other = reader.server_side_store
        return other is self._client or (
            isinstance(other, type(self._client)) and self._client.reaches_same_store(other)
        )

    def lay_out(self, stretches: Sequence[Stretch]) -> list[Part]:
        try:
            parts = plan_parts(stretches, self._rules())
        except ValueError as error:
            raise StorageError(f"cannot write {self.uri}: {error}") from error
        if sum(part.nbytes for part in parts if part.copied) < LEAST_COPIED_NBYTES:
            return []
        self._moves = True
        self._sizes = deque(part.nbytes for part in parts if not part.copied)
        self._part_nbytes = self._sizes.popleft() if self._sizes else RULES.upload_nbytes
        self._begin()
        return parts

    def _rules(self) -> PartRules:
        return PartRules(equal=self._client.options.equal_parts)

    def copy_from(self, reader: RangeReader, offset: int, nbytes: int) -> bool:
        """One part, copied by the store; between parts only, as `lay_out` has cut them."""
        if not self._moves:
            return False
        if not isinstance(reader, S3Reader) or reader.server_side_store is None:
            raise CopyRefused(f"{reader.uri}: not every store takes a copy's source of that name")
        if self._filled:
            assert self._filled == self._part_nbytes, "a copied part begins where a part ends"
            self._send_part()
        number = self._next_number()
        self._submit(COPIES, lambda: self._copy_part(number, reader.copy_source, offset, nbytes), copied=True)
        self.bytes_written += nbytes
        self.bytes_copied += nbytes
        return True

    def _copy_part(self, number: int, source: dict[str, Any], offset: int, nbytes: int) -> _Sent:
        try:
            answer = self._client.attempt(
                "upload_part_copy",
                "write",
                self.uri,
                **self._object,
                **source,
                CopySourceRange=f"bytes={offset}-{offset + nbytes - 1}",
                UploadId=self._upload_id,
                PartNumber=number,
            )
        except SourceChangedError:
            raise
        except StorageError as error:
            # Where the source is really gone, streaming will tell.
            if error.transient or "NoSuchUpload" in str(error):
                raise
            raise CopyRefused(str(error)) from error
        result = answer.get("CopyPartResult") or {}
        if not result.get("ETag"):
            raise CopyRefused(f"cannot write {self.uri}: the store copied a part and named no ETag")
        return _Sent(str(result["ETag"]), result.get("ChecksumCRC32"))

    def settle(self) -> None:
        while self._under_way:
            self._collect()

    # -- the end -------------------------------------------------------------------------------

    def _publish(self) -> None:
        if self._upload_id is None:
            body = self._taken()
            answer = self._client.call("put_object", "write", self.uri, **self._object, Body=body)
            self.identity = Identity("etag", etag_of(answer)) if etag_of(answer) else None
            return
        if self._filled:
            self._send_part()
        self.settle()
        if self._lost_creates:
            with contextlib.suppress(PtbinError):
                self._abort_lost(self._upload_id)
        self._complete(self._upload_id)

    def _complete(self, upload_id: str) -> None:
        parts = []
        for number, sent in enumerate(self._sent, 1):
            part = {"PartNumber": number, "ETag": sent.etag}
            if self.checks_crc32 and sent.crc32 is not None:
                part["ChecksumCRC32"] = sent.crc32
            parts.append(part)
        expected: dict[str, str] = {}
        if self.checks_crc32 and self.expected_crc32 is not None:
            expected = {"ChecksumCRC32": _base64(self.expected_crc32), "ChecksumType": "FULL_OBJECT"}
        try:
            self._client.call(
                "complete_multipart_upload",
                "write",
                self.uri,
                **self._object,
                **expected,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except PtbinError as error:
            if expected and "BadDigest" in str(error):
                raise CopyRefused(
                    f"{self.uri}: the store found another CRC-32 than the source states"
                ) from error
            # A completion whose answer was lost is repeated and then finds no upload any more. Ceph
            # answers with an empty ETag; so ask for the object either way.
            if "NoSuchUpload" not in str(error) or not self._is_stored():
                raise

    def _is_stored(self) -> bool:
        """Whether the object is the one these parts make: S3 derives its ETag from theirs."""
        try:
            digest = hashlib.md5(usedforsecurity=False)
            for sent in self._sent:
                digest.update(bytes.fromhex(sent.etag.strip('"')))
            answer = self._client.call("head_object", "write", self.uri, **self._object)
        except (ValueError, PtbinError):
            return False
        expected = f"{digest.hexdigest()}-{len(self._sent)}"
        return etag_of(answer) == expected and bool(answer["ContentLength"] == self.bytes_written)

    def _discard(self) -> None:
        self._taken()
        futures = [future for _, future in self._under_way]
        self._under_way.clear()
        for future in futures:
            future.cancel()
        # A part that arrives after the abort would stay behind, unseen and paid for.
        wait(futures, timeout=ABORT_WAIT_S)
        if self._beginning is None:
            return
        beginning, self._beginning = self._beginning, None
        with contextlib.suppress(PtbinError, CancelledError):
            upload_id = beginning.result()
            if self._lost_creates:
                with contextlib.suppress(PtbinError):
                    self._abort_lost(upload_id)
            self._client.call(
                "abort_multipart_upload",
                "abort the upload of",
                self.uri,
                **self._object,
                UploadId=upload_id,
            )


def _base64(crc32: int) -> str:
    """As S3 writes a CRC-32: its four bytes, most significant first, in base64."""
    return base64.b64encode(crc32.to_bytes(4, "big")).decode("ascii")
