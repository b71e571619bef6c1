"""One S3 object written in order: a single PUT where it is small, else a multipart upload.

Nothing is visible before `commit`. Parts have one size, but the last (some stores insist), chosen from
the expected size so that 10,000 parts are enough. Up to `WINDOW` parts are under way while the next one
fills: 40 MiB of memory for objects up to 80 GiB, 5 parts' worth above. A failed upload is aborted; its
parts would else be paid for, for ever, without being seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import io
from collections import deque
from typing import TYPE_CHECKING, Any

from ptbin.errors import PtbinError, StorageError
from ptbin.stores.base import MIB, Identity, Writer
from ptbin.stores.s3_reader import etag_of

if TYPE_CHECKING:
    from concurrent.futures import Future

    from ptbin.stores.s3_client import S3Client

__all__ = ["S3Writer", "part_nbytes_for"]

# https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
MAX_PARTS = 10_000
MAX_PART_NBYTES = 5 * 1024 * MIB
PART_NBYTES = 8 * MIB
UNKNOWN_SIZE_PART_NBYTES = 32 * MIB
"""Where no size is foretold: room for 312 GiB."""
WINDOW = 4


def part_nbytes_for(size_hint: int | None) -> int:
    """The part size, whole mebibytes, with which `size_hint` bytes fit into one upload."""
    if size_hint is None:
        return UNKNOWN_SIZE_PART_NBYTES
    needed = -(-size_hint // MAX_PARTS)
    return min(MAX_PART_NBYTES, max(PART_NBYTES, -(-needed // MIB) * MIB))


class S3Writer(Writer):
    """Made by `S3Store.open_writer`; asks nothing of the store before the first part is full."""

    def __init__(self, client: S3Client, uri: str, *, bucket: str, key: str, size_hint: int | None) -> None:
        super().__init__(uri)
        self._client = client
        self._object = {"Bucket": bucket, "Key": key}
        self._part_nbytes = part_nbytes_for(size_hint)
        # Bodies are file objects: aiohttp refuses large plain buffers, which would stall its loop.
        self._filling = io.BytesIO()
        self._upload_id: str | None = None
        self._part_etags: list[str] = []
        self._under_way: deque[Future[str]] = deque()
        self._tasks: set[asyncio.Task[Any]] = set()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            if self._filling.tell() == self._part_nbytes:  # only now is it certain that more follows
                self._send_part()
            taken = rest[: self._part_nbytes - self._filling.tell()]
            self._filling.write(taken)
            self.bytes_written += len(taken)
            rest = rest[len(taken) :]

    def _send_part(self) -> None:
        number = len(self._part_etags) + len(self._under_way) + 1
        if number > MAX_PARTS:
            raise StorageError(
                f"cannot write {self.uri}: more than {MAX_PARTS} parts of {self._part_nbytes} bytes; "
                "it grew beyond the size that was foretold"
            )
        if self._upload_id is None:
            self._upload_id = self._client.wait(self._begin())
        while len(self._under_way) >= WINDOW:
            self._part_etags.append(self._under_way.popleft().result())
        part, self._filling = self._filling, io.BytesIO()
        self._under_way.append(self._client.start(self._upload_part(number, part)))

    async def _begin(self) -> str:
        answer = await self._client.repeated(
            lambda: self._client.attempt("create_multipart_upload", "write", self.uri, **self._object)
        )
        # Kept at once: an interrupted wait must still find what there is to abort.
        self._upload_id = answer["UploadId"]
        return self._upload_id

    async def _upload_part(self, number: int, part: io.BytesIO) -> str:
        task = asyncio.current_task()
        if task is not None:  # always: this runs on the loop
            self._tasks.add(task)
        try:
            answer = await self._send(
                "upload_part", part, UploadId=self._upload_id, PartNumber=number, **self._object
            )
        finally:
            if task is not None:
                self._tasks.discard(task)
        return str(answer["ETag"])

    async def _send(self, method: str, body: io.BytesIO, **parameters: Any) -> dict[str, Any]:
        async def once() -> dict[str, Any]:
            body.seek(0)  # the attempt before has read some of it
            return await self._client.attempt(method, "write", self.uri, **parameters, Body=body)

        return await self._client.repeated(once)

    def _publish(self) -> None:
        if self._upload_id is None:
            answer = self._client.wait(self._send("put_object", self._filling, **self._object))
            self.identity = Identity("etag", etag_of(answer)) if etag_of(answer) else None
            return
        if self._filling.tell():
            self._send_part()
        while self._under_way:
            self._part_etags.append(self._under_way.popleft().result())
        self._complete(self._upload_id)

    def _complete(self, upload_id: str) -> None:
        parts = [{"PartNumber": number, "ETag": etag} for number, etag in enumerate(self._part_etags, 1)]
        try:
            self._client.call(
                "complete_multipart_upload",
                "write",
                self.uri,
                **self._object,
                UploadId=upload_id,
                MultipartUpload={"Parts": parts},
            )
        except PtbinError as error:
            # A completion whose answer was lost is repeated and then finds no upload any more. Ceph
            # answers with an empty ETag; so ask for the object either way.
            if "NoSuchUpload" not in str(error) or not self._is_stored():
                raise

    def _is_stored(self) -> bool:
        """Whether the object is the one these parts make: S3 derives its ETag from theirs."""
        try:
            digest = hashlib.md5(usedforsecurity=False)
            for etag in self._part_etags:
                digest.update(bytes.fromhex(etag.strip('"')))
            answer = self._client.call("head_object", "write", self.uri, **self._object)
        except (ValueError, PtbinError):
            return False
        expected = f"{digest.hexdigest()}-{len(self._part_etags)}"
        return etag_of(answer) == expected and answer["ContentLength"] == self.bytes_written

    def _discard(self) -> None:
        self._filling = io.BytesIO()
        with contextlib.suppress(PtbinError):
            self._client.wait(self._abort())

    async def _abort(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._upload_id is not None:
            upload_id, self._upload_id = self._upload_id, None
            await self._client.repeated(
                lambda: self._client.attempt(
                    "abort_multipart_upload",
                    "abort the upload of",
                    self.uri,
                    **self._object,
                    UploadId=upload_id,
                )
            )
