"""Amazon S3 and what speaks its protocol (Ceph, MinIO, R2, ...).

Owns requests for objects and listings and their costs: `stat` one HEAD; `look` one GET, which brings the last
`TAIL_NBYTES` along; `read_bytes` one GET; a listing one request for a thousand keys with the next pages under
way (see `s3_listing`); reading `look` and then ranges (see `s3_reader`), so one request for a small object;
writing one PUT or a multipart upload (see `s3_writer`). Nothing is cached: two calls see two states of the
store.

An object's identity is its ETag, in listings and in `stat` alike, so that a rerun recognises what it
has done from the listing alone; a versioned bucket's version id pins a reader in addition.
"""

from __future__ import annotations

import base64
import contextlib
from typing import TYPE_CHECKING, Any

from ptbin.errors import AccessDeniedError, NotFoundInStoreError, PtbinError, StorageError, UsageError
from ptbin.stores.base import (
    PARTIAL_SUFFIX,
    READ_BYTES_LIMIT,
    Identity,
    ListedObject,
    ObjectStat,
    Store,
    Watch,
    is_partial_name,
    refuse_other_object,
    refuse_too_large,
    target_of_partial,
)
from ptbin.stores.s3_client import S3Client
from ptbin.stores.s3_listing import iter_entries
from ptbin.stores.s3_reader import S3Reader, S3Stat, etag_of
from ptbin.stores.s3_writer import CLAIM_METADATA, S3Writer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ptbin.stores.retry import RetryPolicy

__all__ = ["S3Store", "open_s3"]

TAIL_NBYTES = 256 * 1024
"""A request costs about as much as these bytes."""
_SCHEMES = ("s3://", "s3a://")


def open_s3(uri: str, options: Mapping[str, Any]) -> tuple[Store, str]:
    path = uri[uri.index("://") + 3 :] if uri.lower().startswith(_SCHEMES) else ""
    if not path.partition("/")[0]:
        raise UsageError(f"{uri} names no bucket; expected s3://bucket/path")
    return S3Store(options), path


class S3Store(Store):
    """A path is "bucket/key"; keys are taken as they are, nothing in them is decoded or folded."""

    protocol = "s3"
    carries_claims = True
    page_keys: int | None = None
    """Keys in a page of a listing; None: as many as the store gives."""

    def __init__(self, options: Mapping[str, Any] | None = None, *, retry: RetryPolicy | None = None) -> None:
        self.client = S3Client(options or {}, retry=retry)

    def uri_of(self, path: str) -> str:
        return f"s3://{path}"

    def stat(self, path: str) -> ObjectStat:
        answer = self._head(path)
        return ObjectStat(self.uri_of(path), answer["ContentLength"], Identity("etag", etag_of(answer)))

    def _head(self, path: str) -> dict[str, Any]:
        uri, (bucket, key) = self.uri_of(path), self._key_of(path)
        try:
            return self.client.call("head_object", "read", uri, Bucket=bucket, Key=key)
        except NotFoundInStoreError:
            # A HEAD's answer has no body that would tell a missing bucket from a missing key.
            self._refuse_missing_bucket(bucket, "read", uri)
            raise

    def _refuse_missing_bucket(self, bucket: str, doing: str, uri: str) -> None:
        try:
            self.client.call("head_bucket", doing, uri, Bucket=bucket)
        except NotFoundInStoreError as error:
            raise NotFoundInStoreError(f"cannot {doing} {uri}: there is no such bucket") from error
        except PtbinError:
            return  # allowed to use objects, not to ask for the bucket

    def is_directory(self, path: str) -> bool:
        """One listing of one key, two where keys lie between that of an object and the prefix of its name.

        Where both are there, an object and keys below its name, the path with a slash at its end is the
        prefix, and without one the object, unless that is an empty marker.

        Raises:
            NotFoundInStoreError: not even the bucket exists.
        """
        bucket, key = self.client.split(path)
        if key and not key.endswith("/"):
            first = self._first(path, bucket, key)
            if first is None or (first["Key"] == key and first["Size"]):
                return False
            if first["Key"].startswith(f"{key}/"):
                return True
        return self._first(path, *self._prefix(path)) is not None

    def _first(self, path: str, bucket: str, prefix: str) -> dict[str, Any] | None:
        answer = self.client.call(
            "list_objects_v2", "list", self.uri_of(path), Bucket=bucket, Prefix=prefix, MaxKeys=1
        )
        return next(iter(answer.get("Contents", ())), None)

    def _prefix(self, path: str) -> tuple[str, str]:
        bucket, key = self.client.split(path)
        return bucket, key if not key or key.endswith("/") else key + "/"

    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        """In the order of the keys' UTF-8 bytes; costs and memory as `s3_listing` says."""
        del watch  # keys are files
        bucket, prefix = self._prefix(path)
        for key, size, etag in iter_entries(
            self.client, self.uri_of(path), bucket, prefix, page_keys=self.page_keys
        ):
            if is_partial_name(key):
                continue
            if not size and key.endswith("/"):  # the "folders" of web consoles
                continue
            uri = self.uri_of(f"{bucket}/{key}")
            yield ListedObject(key[len(prefix) :], uri, size, Identity("etag", etag))

    def look(self, path: str) -> S3Stat:
        """One GET, which brings the last `TAIL_NBYTES` along: a whole small object, a large archive's index.

        A second request (HEAD) where the object is empty, or the server ignores ranges.
        """
        uri = self.uri_of(path)

        def accept(nbytes: int) -> None:
            if nbytes > TAIL_NBYTES:
                raise StorageError(f"cannot read {uri}: the server ignores ranges")

        try:
            tail, answer = self._get(path, accept, Range=f"bytes=-{TAIL_NBYTES}")
        except NotFoundInStoreError:
            raise
        except StorageError as error:
            if error.transient or isinstance(error, AccessDeniedError):
                raise
            answer, tail = self._head(path), b""
        version = answer.get("VersionId")
        return S3Stat(
            uri,
            _size_of(answer),
            Identity("etag", etag_of(answer)),
            # "null" names whatever was last written while versioning was off: it pins nothing.
            None if version in (None, "null") else version,
            tail,
        )

    def _get(self, path: str, accept: Callable[[int], None], **how: Any) -> tuple[bytes, dict[str, Any]]:
        """One GET of an object, whose answer is one state of it; `accept` refuses too many bytes."""
        uri, (bucket, key) = self.uri_of(path), self._key_of(path)

        async def get() -> tuple[bytes, dict[str, Any]]:
            answers: list[dict[str, Any]] = []
            blocks: list[bytes] = []

            def begin(answer: dict[str, Any]) -> None:
                answers.append(answer)
                accept(answer["ContentLength"])

            await self.client.fetch("read", uri, begin, blocks.append, Bucket=bucket, Key=key, **how)
            data, size = b"".join(blocks), answers[0]["ContentLength"]
            if len(data) != size:
                raise StorageError(f"cannot read {uri}: {len(data)} of {size} bytes came", transient=True)
            return data, answers[0]

        return self.client.repeated(get)

    def _key_of(self, path: str) -> tuple[str, str]:
        """The bucket and the key of an object that is to be read."""
        bucket, key = self.client.split(path)
        if not key:
            raise NotFoundInStoreError(f"cannot read {self.uri_of(path)}: it is a bucket, not an object")
        return bucket, key

    def open_reader(self, path: str, *, expected: Identity | None = None) -> S3Reader:
        """By `look`."""
        found = self.look(path)
        if expected is not None:
            refuse_other_object(found.uri, found.identity, expected)
        return self.open_found(path, found)

    def open_found(self, path: str, found: ObjectStat) -> S3Reader:
        """No request."""
        assert isinstance(found, S3Stat)
        bucket, key = self.client.split(path)
        return S3Reader(self.client, found, bucket=bucket, key=key)

    def open_writer(
        self, path: str, *, size_hint: int | None = None, copies: bool = True, claim: str = ""
    ) -> S3Writer:
        bucket, key = self.client.split(path)
        if not key or key.endswith("/"):
            raise StorageError(f"cannot write {self.uri_of(path)}: it names no object")
        return S3Writer(
            self.client,
            self.uri_of(path),
            bucket=bucket,
            key=key,
            size_hint=size_hint,
            copies=copies and self.client.options.server_side_copy,
            claim=claim,
        )

    def claim_of(self, path: str) -> str:
        """One HEAD."""
        bucket, key = self.client.split(path)
        try:
            answer = self.client.call("head_object", "read", self.uri_of(path), Bucket=bucket, Key=key)
        except NotFoundInStoreError:
            return ""
        return str((answer.get("Metadata") or {}).get(CLAIM_METADATA, ""))

    def crc32_of(self, path: str) -> int | None:
        """One HEAD. Of composite checksums (of parts, not of the object) S3 says so: they are none."""
        bucket, key = self.client.split(path)
        answer = self.client.call(
            "head_object", "read", self.uri_of(path), Bucket=bucket, Key=key, ChecksumMode="ENABLED"
        )
        stated = answer.get("ChecksumCRC32")
        if not isinstance(stated, str) or answer.get("ChecksumType") != "FULL_OBJECT":
            return None
        try:
            digest = base64.b64decode(stated, validate=True)
        except ValueError:
            return None
        return int.from_bytes(digest, "big") if len(digest) == 4 else None

    def read_identified(self, path: str, *, limit: int = READ_BYTES_LIMIT) -> tuple[bytes, Identity]:
        """One GET: nothing needs pinning."""
        data, answer = self._get(path, lambda nbytes: refuse_too_large(self.uri_of(path), nbytes, limit))
        return data, Identity("etag", etag_of(answer))

    def delete(self, path: str) -> None:
        bucket, key = self.client.split(path)
        self.client.call("delete_object", "delete", self.uri_of(path), Bucket=bucket, Key=key)

    def discard_unfinished(self, path: str, is_ours: Callable[[str], bool]) -> int:
        """Abort multipart uploads; a request for a thousand of them, and one for each that is ours."""
        bucket, prefix = self._prefix(path)
        uri, count = self.uri_of(path), 0
        asked: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix}
        while True:
            answer = self.client.call("list_multipart_uploads", "list uploads below", uri, **asked)
            for upload in answer.get("Uploads", ()):
                key = str(upload["Key"])
                target = target_of_partial(key) if is_partial_name(key) else key
                if is_ours(target[len(prefix) :]):
                    named = {"Bucket": bucket, "Key": key, "UploadId": upload["UploadId"]}
                    self.client.call("abort_multipart_upload", "abort the upload of", uri, **named)
                    count += 1
            if not answer.get("IsTruncated"):
                return count
            asked["KeyMarker"] = answer["NextKeyMarker"]
            asked["UploadIdMarker"] = answer["NextUploadIdMarker"]

    def check_writable(self, path: str) -> None:
        """Three small requests: is the bucket there, may an upload be begun; it is aborted at once.

        So nothing ever appears, not even in a bucket that keeps versions or sends events.
        """
        bucket, key = self.client.split(path)
        uri = self.uri_of(path)
        with contextlib.suppress(AccessDeniedError):  # the right to write does not imply the right to ask
            try:
                self.client.call("head_bucket", "write to", uri, Bucket=bucket)
            except NotFoundInStoreError as error:
                raise NotFoundInStoreError(f"cannot write to {uri}: there is no such bucket") from error
        probe = f"{key.rstrip('/')}/.check{PARTIAL_SUFFIX}".lstrip("/")
        answer = self.client.call("create_multipart_upload", "write to", uri, Bucket=bucket, Key=probe)
        with contextlib.suppress(StorageError):
            self.client.call(
                "abort_multipart_upload",
                "write to",
                uri,
                Bucket=bucket,
                Key=probe,
                UploadId=answer["UploadId"],
            )


def _size_of(answer: Mapping[str, Any]) -> int:
    """Of the whole object, where the answer may hold a range of it ("bytes 5-9/10", RFC 9110, 14.4)."""
    _, _, size = str(answer.get("ContentRange") or "").rpartition("/")
    return int(size) if size.isdecimal() else int(answer["ContentLength"])
