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
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ptbin.errors import AccessDeniedError, NotFoundInStoreError, PtbinError, StorageError, UsageError
from ptbin.stores.base import Store, Watch
from ptbin.stores.s3_client import S3Client, S3Object
from ptbin.stores.s3_listing import iter_entries
from ptbin.stores.s3_reader import S3Reader, S3Stat, etag_of
from ptbin.stores.s3_writer import CLAIM_METADATA, S3Writer
from ptbin.stores.values import (
    PARTIAL_SUFFIX,
    READ_BYTES_LIMIT,
    Identity,
    ListedObject,
    ObjectStat,
    is_partial_name,
    refuse_too_large,
    target_of_partial,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from ptbin.stores.requests import RetryPolicy

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
        at = self._object(path)
        try:
            return at.call("head_object")
        except NotFoundInStoreError:
            # A HEAD's answer has no body that would tell a missing bucket from a missing key.
            self._refuse_missing_bucket(at, "read")
            raise

    def _refuse_missing_bucket(self, at: S3Object, doing: str) -> None:
        try:
            self.client.call("head_bucket", at.uri, Bucket=at.bucket)
        except NotFoundInStoreError as error:
            raise NotFoundInStoreError(f"cannot {doing} {at.uri}: there is no such bucket") from error
        except PtbinError:
            return  # allowed to use objects, not to ask for the bucket; a store that is down will show

    def is_directory(self, path: str) -> bool:
        """One listing of one key, two where keys lie between that of an object and the prefix of its name.

        Where both are there, an object and keys below its name, the path with a slash at its end is the
        prefix, and without one the object, unless that is an empty marker.

        Raises:
            NotFoundInStoreError: not even the bucket exists.
        """
        at = self._at(path)
        if at.key != at.prefix:
            first = self._first(at, at.key)
            if first is None or (first["Key"] == at.key and first["Size"]):
                return False
            if first["Key"].startswith(at.prefix):
                return True
        return self._first(at, at.prefix) is not None

    def _first(self, at: S3Object, prefix: str) -> dict[str, Any] | None:
        asked = {"Bucket": at.bucket, "Prefix": prefix, "MaxKeys": 1}
        answer = self.client.call("list_objects_v2", at.uri, **asked)
        return next(iter(answer.get("Contents", ())), None)

    def _at(self, path: str) -> S3Object:
        return S3Object.of_path(self.client, path)

    def _object(self, path: str) -> S3Object:
        """As `_at`, of what is to be read."""
        at = self._at(path)
        if not at.key:
            raise NotFoundInStoreError(f"cannot read {at.uri}: it is a bucket, not an object")
        return at

    def iter_objects(self, path: str, watch: Watch | None = None) -> Iterator[ListedObject]:
        """In the order of the keys' UTF-8 bytes; costs and memory as `s3_listing` says."""
        del watch  # keys are files
        at = self._at(path)
        prefix = at.prefix
        for key, size, etag in iter_entries(self.client, at.uri, at.bucket, prefix, page_keys=self.page_keys):
            if is_partial_name(key):
                continue
            if not size and key.endswith("/"):  # the "folders" of web consoles
                continue
            uri = self.uri_of(f"{at.bucket}/{key}")
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
        at = self._object(path)

        async def get() -> tuple[bytes, dict[str, Any]]:
            answers: list[dict[str, Any]] = []
            blocks: list[bytes] = []

            def begin(answer: dict[str, Any]) -> None:
                answers.append(answer)
                accept(answer["ContentLength"])

            await at.fetch(begin, blocks.append, **how)
            data, size = b"".join(blocks), answers[0]["ContentLength"]
            if len(data) != size:
                raise StorageError(f"cannot read {at.uri}: {len(data)} of {size} bytes came", transient=True)
            return data, answers[0]

        return self.client.repeated(get)

    def open_reader(self, path: str, *, expected: Identity | None = None) -> S3Reader:
        """By `look`."""
        return self.open_found(path, self.look(path)).expecting(expected)

    def open_found(self, path: str, found: ObjectStat) -> S3Reader:
        """No request."""
        assert isinstance(found, S3Stat)
        return S3Reader(self._at(path), found)

    def open_writer(
        self, path: str, *, size_hint: int | None = None, copies: bool = True, claim: str = ""
    ) -> S3Writer:
        at = self._at(path)
        if at.key == at.prefix:
            raise StorageError(f"cannot write {at.uri}: it names no object")
        return S3Writer(at, size_hint=size_hint, copies=copies, claim=claim)

    def claim_of(self, path: str) -> str:
        """One HEAD."""
        try:
            answer = self._at(path).call("head_object")
        except NotFoundInStoreError:
            return ""
        return str((answer.get("Metadata") or {}).get(CLAIM_METADATA, ""))

    def crc32_of(self, path: str) -> int | None:
        """One HEAD. Of composite checksums (of parts, not of the object) S3 says so: they are none."""
        answer = self._at(path).call("head_object", ChecksumMode="ENABLED")
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
        self._at(path).call("delete_object")

    def discard_unfinished(self, path: str, is_ours: Callable[[str], bool]) -> int:
        """Abort multipart uploads; a request for a thousand of them, and one for each that is ours."""
        at, count = self._at(path), 0
        asked: dict[str, Any] = {"Bucket": at.bucket, "Prefix": at.prefix}
        while True:
            answer = self.client.call("list_multipart_uploads", at.uri, **asked)
            for upload in answer.get("Uploads", ()):
                key = str(upload["Key"])
                target = target_of_partial(key) if is_partial_name(key) else key
                if is_ours(target[len(at.prefix) :]):
                    replace(at, key=key).call("abort_multipart_upload", UploadId=upload["UploadId"])
                    count += 1
            if not answer.get("IsTruncated"):
                return count
            asked["KeyMarker"] = answer["NextKeyMarker"]
            asked["UploadIdMarker"] = answer["NextUploadIdMarker"]

    def check_writable(self, path: str) -> None:
        """Four small requests: is the bucket there, may an upload be begun; it is aborted at once, and what a
        process that was killed in between has left of its own.

        So nothing ever appears, not even in a bucket that keeps versions or sends events.
        """
        at = self._at(path)
        self._refuse_missing_bucket(at, "write to")
        probe = replace(at, key=f"{at.key.rstrip('/')}/.check{PARTIAL_SUFFIX}".lstrip("/"))
        begun = {probe.call("create_multipart_upload")["UploadId"]}
        with contextlib.suppress(StorageError):
            asked = {"Bucket": probe.bucket, "Prefix": probe.key}
            answer = self.client.call("list_multipart_uploads", probe.uri, **asked)
            begun |= {row["UploadId"] for row in answer.get("Uploads", ()) if row["Key"] == probe.key}
        for upload_id in begun:
            with contextlib.suppress(StorageError):
                probe.call("abort_multipart_upload", UploadId=upload_id)


def _size_of(answer: Mapping[str, Any]) -> int:
    """Of the whole object, where the answer may hold a range of it ("bytes 5-9/10", RFC 9110, 14.4)."""
    _, _, size = str(answer.get("ContentRange") or "").rpartition("/")
    return int(size) if size.isdecimal() else int(answer["ContentLength"])
