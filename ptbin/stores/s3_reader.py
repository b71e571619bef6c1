"""Ranged GETs of one S3 object, each of them conditional.

Owns the pin: every request carries `IfMatch` (and `VersionId` where the bucket keeps versions), every
answer's ETag and length are checked, so that bytes of two states of an object never mix. Sequential
reading keeps `window` requests of `best_chunk_nbytes` under way: 32 MiB of memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ptbin.errors import NotFoundInStoreError, SourceChangedError, StorageError
from ptbin.stores.base import MIB, Identity, Pending, RangeReader, check_range, refuse_other_object
from ptbin.stores.ranges import Fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ptbin.stores.s3_client import S3Client

__all__ = ["S3Reader", "etag_of"]


def etag_of(answer: Mapping[str, Any]) -> str:
    """The ETag without its quotes; empty where the store gives none."""
    return str(answer.get("ETag") or "").strip('"')


class S3Reader(RangeReader):
    """Made by `S3Store.open_reader`, which has just asked for size, ETag and version id."""

    gap_nbytes = 256 * 1024
    best_chunk_nbytes = 8 * MIB
    window = 4

    def __init__(
        self,
        client: S3Client,
        uri: str,
        *,
        bucket: str,
        key: str,
        size: int,
        etag: str,
        version_id: str | None,
    ) -> None:
        super().__init__(uri, size, Identity("etag", etag))
        self.version_id = version_id
        self._client = client
        self._object = {"Bucket": bucket, "Key": key}
        self._etag = etag
        self._pin: dict[str, str] = {}
        if etag:
            self._pin["IfMatch"] = f'"{etag}"'
        if version_id is not None:
            self._pin["VersionId"] = version_id

    def read(self, offset: int, nbytes: int) -> bytes:
        """As the base says; more than two chunks come as several requests at once."""
        check_range(self.uri, self.size, offset, nbytes)
        if nbytes == 0:
            return b""
        if nbytes > 2 * self.best_chunk_nbytes:
            return b"".join(self.iter_range(offset, nbytes))
        return self.start_fetch(Fetch(offset, nbytes, ()))()

    def start_fetch(self, fetch: Fetch) -> Callable[[], bytes]:
        get = self._client.repeated(lambda: self._get(fetch.offset, fetch.nbytes))
        return Pending(self._client.start(get))

    async def _get(self, offset: int, nbytes: int) -> bytes:
        self.requests += 1
        try:
            answer = await self._client.attempt(
                "get_object",
                "read",
                self.uri,
                **self._object,
                **self._pin,
                Range=f"bytes={offset}-{offset + nbytes - 1}",  # inclusive (RFC 9110, 14.1.2)
            )
        except NotFoundInStoreError as error:
            raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
        except StorageError as error:
            if "InvalidRange" in str(error):  # the range lies in the pinned object: so this is another one
                raise SourceChangedError(f"{self.uri} was overwritten while it was read") from error
            raise
        if etag_of(answer) != self._etag or answer["ContentLength"] != nbytes:
            answer["Body"].close()
            refuse_other_object(self.uri, Identity("etag", etag_of(answer)), self.identity)
            raise StorageError(
                f"cannot read {self.uri}: {nbytes} bytes were asked and {answer['ContentLength']} announced: "
                "the server ignores ranges"
            )
        data = await self._client.body(answer, "read", self.uri)
        self.bytes_read += len(data)
        if len(data) != nbytes:
            raise StorageError(
                f"cannot read {self.uri}: {len(data)} of {nbytes} bytes came at offset {offset}",
                transient=True,
            )
        return data

    def check_unchanged(self) -> None:
        """One HEAD of the name, whatever version was read."""
        try:
            answer = self._client.call("head_object", "read", self.uri, **self._object)
        except NotFoundInStoreError as error:
            raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
        refuse_other_object(self.uri, Identity("etag", etag_of(answer)), self.identity)
