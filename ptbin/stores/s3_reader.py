"""Ranged GETs of one S3 object, each of them conditional.

Owns the pin: every request carries `IfMatch` (and `VersionId` where the bucket keeps versions), every
answer's ETag and length are checked, so that bytes of two states of an object never mix. Sequential
reading keeps `window_nbytes` under way or waiting to be consumed: 32 MiB of memory.
"""

from __future__ import annotations

import threading
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
    window_nbytes = 32 * MIB
    max_under_way = 16

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
        self._counting = threading.Lock()
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
        def get() -> bytes:
            return self._client.repeated(lambda: self._get(fetch.offset, fetch.nbytes))

        return Pending(self._client.start(get))

    def _get(self, offset: int, nbytes: int) -> bytes:
        with self._counting:
            self.requests += 1

        def accept(answer: dict[str, Any]) -> None:
            if etag_of(answer) == self._etag and answer["ContentLength"] == nbytes:
                return
            refuse_other_object(self.uri, Identity("etag", etag_of(answer)), self.identity)
            raise StorageError(
                f"cannot read {self.uri}: {nbytes} bytes were asked and {answer['ContentLength']} announced: "
                "the server ignores ranges"
            )

        last = offset + nbytes - 1  # inclusive (RFC 9110, 14.1.2)
        try:
            _, data = self._client.fetch(
                "read", self.uri, accept, **self._object, **self._pin, Range=f"bytes={offset}-{last}"
            )
        except NotFoundInStoreError as error:
            raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
        except StorageError as error:
            if "InvalidRange" in str(error):  # the range lies in the pinned object: so this is another one
                raise SourceChangedError(f"{self.uri} was overwritten while it was read") from error
            raise
        with self._counting:
            self.bytes_read += len(data)
        if len(data) != nbytes:
            raise StorageError(
                f"cannot read {self.uri}: {len(data)} of {nbytes} bytes came at offset {offset}",
                transient=True,
            )
        return data

    @property
    def server_side_store(self) -> S3Client:
        return self._client

    @property
    def copy_source(self) -> dict[str, Any]:
        """Arguments of `upload_part_copy` that name this very state of the object.

        Some servers ignore the ETag here (Ceph does): whoever copies asks `check_unchanged` afterwards.
        """
        source = dict(self._object)
        if self.version_id is not None:
            source["VersionId"] = self.version_id
        named: dict[str, Any] = {"CopySource": source}
        if self._etag:
            named["CopySourceIfMatch"] = f'"{self._etag}"'
        return named

    def check_unchanged(self) -> None:
        """One HEAD of the name, whatever version was read."""
        try:
            answer = self._client.call("head_object", "read", self.uri, **self._object)
        except NotFoundInStoreError as error:
            raise SourceChangedError(f"{self.uri} was deleted while it was read") from error
        refuse_other_object(self.uri, Identity("etag", etag_of(answer)), self.identity)
