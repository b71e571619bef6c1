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
from collections import deque
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import CancelledError, wait
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ptbin.errors import (
    AccessDeniedError,
    NotFoundInStoreError,
    PtbinError,
    SourceChangedError,
    StorageError,
)
from ptbin.stores.parts import Extent, Part, PartRules, plan_parts
from ptbin.stores.s3_client import S3Client
from ptbin.stores.s3_reader import S3Reader, etag_of
from ptbin.stores.values import MIB, Identity
from ptbin.stores.writer import CopyRefused, Writer
from ptbin.values.crc32 import crc32_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from concurrent.futures import Future

    from ptbin.stores.reader import RangeReader
    from ptbin.stores.s3_client import S3Object

CLAIM_METADATA = "ptbin-claim"
"""Sent and kept as the header `x-amz-meta-ptbin-claim`."""

RULES = PartRules()
UNKNOWN_SIZE_PART_NBYTES = 32 * MIB
"""Where no size is foretold: room for 312 GiB."""
UPLOADS = 4
COPIES = 8
BODY_BLOCK_NBYTES = 256 * 1024
"""Bodies go to the socket by so much at a time, as fast as it takes them."""
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

    def __init__(self, at: S3Object, *, size_hint: int | None, copies: bool, claim: str = "") -> None:
        super().__init__(at.uri)
        self._at = at
        self._client = at.client
        self._metadata: dict[str, Any] = {}
        if claim:
            self._metadata = {"Metadata": {**at.client.options.metadata, CLAIM_METADATA: claim}}
        self._copies = copies and at.client.options.server_side_copy
        self._part_nbytes = part_nbytes_for(size_hint)
        self._sizes: deque[int] = deque()  # of the parts to be uploaded, where they were laid out
        self._filling = bytearray()
        self._upload_id: str | None = None
        self._beginning: Future[str] | None = None
        self._parts: list[Future[_Sent]] = []
        self._under_way: dict[bool, deque[Future[_Sent]]] = {False: deque(), True: deque()}
        """Uploads and copies: the youngest parts of each kind, which may not have arrived."""

    # -- bytes that come from here -------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            if len(self._filling) == self._part_nbytes:  # only now is it certain that more follows
                self._send_part()
            taken = rest[: self._part_nbytes - len(self._filling)]
            self._filling += taken
            self.bytes_written += len(taken)
            rest = rest[len(taken) :]

    def _send_part(self) -> None:
        number = self._next_number()
        part = self._taken()
        if self._sizes:
            self._part_nbytes = self._sizes.popleft()
        self._submit(UPLOADS, partial(self._upload_part, number, part), copied=False)

    def _taken(self) -> bytearray:
        """What has been gathered so far, which is then forgotten here."""
        part, self._filling = self._filling, bytearray()
        return part

    def _next_number(self) -> int:
        number = len(self._parts) + 1
        if number > RULES.max_parts:
            raise StorageError(
                f"cannot write {self.uri}: more than {RULES.max_parts} parts of {self._part_nbytes} bytes; "
                "it grew beyond the size that was foretold"
            )
        self._begin()
        return number

    def _submit(self, most: int, work: Callable[[], Awaitable[_Sent]], *, copied: bool) -> None:
        """Start a part; wait before for the oldest one while too many of its kind are under way."""
        row = self._under_way[copied]
        while len(row) >= most:
            row.popleft().result()

        async def unless_aborted() -> _Sent:
            if not self._open:
                raise StorageError(f"the upload of {self.uri} was given up")
            return await work()

        row.append(self._client.start(partial(self._client.arepeated, unless_aborted)))
        self._parts.append(row[-1])

    def _begin(self) -> None:
        if self._beginning is None:
            # Goes on where this wait is interrupted: an upload that the store has begun must not be lost.
            self._beginning = self._client.start(self._create_upload)
        self._upload_id = self._beginning.result()

    async def _create_upload(self) -> str:
        """Begin the upload; with copies in it, ask the store to keep a CRC-32 of the whole object."""
        begin = partial(self._at.acall, "create_multipart_upload", **self._metadata)
        asked: dict[str, str] = {}
        if self._moves:
            asked = {"ChecksumAlgorithm": "CRC32", "ChecksumType": "FULL_OBJECT"}
        try:
            answer = await begin(**asked)
        except StorageError as error:
            if not asked or error.transient or isinstance(error, (AccessDeniedError, NotFoundInStoreError)):
                raise
            answer = await begin()
        # A store that knows nothing of checksums drops the wish without a word.
        self.checks_crc32 = bool(asked) and answer.get("ChecksumAlgorithm") == "CRC32"
        return str(answer["UploadId"])

    async def _upload_part(self, number: int, part: bytearray) -> _Sent:
        checksum = {"ChecksumCRC32": _base64(crc32_of(part))} if self.checks_crc32 else {}
        which = {"UploadId": self._upload_id, "PartNumber": number}
        answer = await self._at.attempt("upload_part", **which, **checksum, **self._body(part))
        return _Sent(str(answer["ETag"]), checksum.get("ChecksumCRC32"))

    def _body(self, data: bytearray) -> dict[str, Any]:
        """As arguments of a call. Not `bytes`: botocore makes a file of those, which is read in a thread."""
        if len(data) <= BODY_BLOCK_NBYTES or not self._client.streams_bodies:
            return {"Body": data}
        return {"Body": _Blocks(data), "ContentLength": len(data)}

    # -- bytes that the store has --------------------------------------------------------------

    _moves = False

    def moves_from(self, reader: RangeReader) -> bool:
        other = reader.server_side_store
        return self._copies and isinstance(other, S3Client) and self._client.reaches_same_store(other)

    def lay_out(self, stretches: Sequence[Extent]) -> list[Part]:
        try:
            parts = plan_parts(stretches, PartRules(equal=self._client.equal_parts))
        except ValueError as error:
            raise StorageError(f"cannot write {self.uri}: {error}") from error
        if sum(part.nbytes for part in parts if part.copied) < LEAST_COPIED_NBYTES:
            return []
        self._moves = True
        self._sizes = deque(part.nbytes for part in parts if not part.copied)
        self._part_nbytes = self._sizes.popleft() if self._sizes else RULES.upload_nbytes
        self._begin()
        return parts

    def copy_from(self, reader: RangeReader, offset: int, nbytes: int) -> bool:
        """One part, copied by the store; between parts only, as `lay_out` has cut them."""
        if not self._moves:
            return False
        if not isinstance(reader, S3Reader) or reader.server_side_store is None:
            raise CopyRefused(f"{reader.uri}: not every store takes a copy's source of that name")
        if self._filling:
            assert len(self._filling) == self._part_nbytes, "a copied part begins where a part ends"
            self._send_part()
        number = self._next_number()
        self._submit(
            COPIES, partial(self._copy_part, number, reader.copy_source, offset, nbytes), copied=True
        )
        self.bytes_written += nbytes
        self.bytes_copied += nbytes
        return True

    async def _copy_part(self, number: int, source: dict[str, Any], offset: int, nbytes: int) -> _Sent:
        try:
            answer = await self._at.attempt(
                "upload_part_copy",
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
        for part in self._parts:
            part.result()

    # -- the end -------------------------------------------------------------------------------

    def held(self) -> bytearray | None:
        return self._filling if self._beginning is None else None

    def _publish(self) -> None:
        if self._upload_id is None:
            body = self._taken()
            # Not so where a key of KMS or of the caller's encrypts it, or where a gateway has other ETags.
            md5 = hashlib.md5(body, usedforsecurity=False).hexdigest()

            answer = self._at.call("put_object", **self._metadata, **self._body(body))
            self.identity = Identity("etag", etag_of(answer)) if etag_of(answer) else None
            self.acknowledged = etag_of(answer) == md5
            return
        if self._filling:
            self._send_part()
        self.settle()
        self._complete(self._upload_id)

    def _complete(self, upload_id: str) -> None:
        parts = []
        for number, sent in enumerate((part.result() for part in self._parts), 1):
            part = {"PartNumber": number, "ETag": sent.etag}
            if self.checks_crc32 and sent.crc32 is not None:
                part["ChecksumCRC32"] = sent.crc32
            parts.append(part)
        expected: dict[str, str] = {}
        if self.checks_crc32 and self.expected_crc32 is not None:
            expected = {"ChecksumCRC32": _base64(self.expected_crc32), "ChecksumType": "FULL_OBJECT"}
        try:
            which = {"UploadId": upload_id, "MultipartUpload": {"Parts": parts}}
            self._at.call("complete_multipart_upload", **which, **expected)
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
            for part in self._parts:
                digest.update(bytes.fromhex(part.result().etag.strip('"')))
            answer = self._at.call("head_object")
        except (ValueError, PtbinError):
            return False
        expected = f"{digest.hexdigest()}-{len(self._parts)}"
        return etag_of(answer) == expected and bool(answer["ContentLength"] == self.bytes_written)

    def _discard(self) -> None:
        self._taken()
        # A part that arrives after the abort would stay behind, unseen and paid for.
        for part in wait(self._parts, timeout=ABORT_WAIT_S).not_done:
            part.cancel()
        if self._beginning is None:
            return
        beginning, self._beginning = self._beginning, None
        with contextlib.suppress(PtbinError, CancelledError):
            self._at.call("abort_multipart_upload", UploadId=beginning.result())


class _Blocks:
    """A body that is sent block by block, as the socket takes it; each attempt begins anew.

    A file would be read in a thread, 64 KiB at a time: half as fast. Bytes in one piece would be copied into
    the connection's buffer, whole.
    """

    def __init__(self, data: bytearray) -> None:
        self._data = memoryview(data)

    def read(self) -> bytes:
        """What botocore takes for the mark of a body; it is never called."""
        raise NotImplementedError

    async def __aiter__(self) -> AsyncIterator[memoryview]:
        for start in range(0, len(self._data), BODY_BLOCK_NBYTES):
            yield self._data[start : start + BODY_BLOCK_NBYTES]


def _base64(crc32: int) -> str:
    """As S3 writes a CRC-32: its four bytes, most significant first, in base64."""
    return base64.b64encode(crc32.to_bytes(4, "big")).decode("ascii")
