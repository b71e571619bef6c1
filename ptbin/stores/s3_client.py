"""Calls to S3 through s3fs: one `S3FileSystem` for each set of options and process.

Owns the making of that filesystem, and the one place where an S3 call is made, limited, repeated and its
failure translated. Knows no reading or writing. Calls are coroutines on the filesystem's own event loop, in
fsspec's thread; `call` waits for one, `start` does not. s3fs's file API is not used: its client
(`_call_s3`, `get_s3`) moves more bytes, and takes conditions, parts and checksums (docs/transfers.md).

Repetitions of botocore and s3fs are off (unless options ask for botocore's): layers multiply the attempts,
and neither repeats answers whose body breaks off. Two things remain below ours: aiohttp sends a request once
more where the connection it had kept was closed meanwhile, and s3fs waits 0.1 s before it reports a timeout.
"""

from __future__ import annotations

import asyncio
import os
import re
import threading
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ptbin.errors import UsageError
from ptbin.stores.faults import mapped_faults
from ptbin.stores.reader import wait_for
from ptbin.stores.requests import RetryPolicy, call_with_retries_async, request_slot
from ptbin.stores.s3_options import read_options

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from concurrent.futures import Future
    from typing import TypeVar

    T = TypeVar("T")
    Accept = Callable[[dict[str, Any]], None]
    Consume = Callable[[bytes], Awaitable[None] | None]

__all__ = ["S3Client", "S3Object"]

DOING = {
    "abort_multipart_upload": "abort the upload of",
    "delete_object": "delete",
    "get_object": "read",
    "head_object": "read",
    "list_multipart_uploads": "list uploads below",
    "list_objects_v2": "list",
}
"""What a call is for, as messages say it; "write" where nothing else is said."""

BLOCK_NBYTES = 1 << 20
"""Bodies are read by at most so much, into memory that was used before. Read at once, bodies of 8 MiB took
twice the time, most of it the kernel's, for fresh pages. aiohttp receives twice as much ahead."""

# arn:aws:s3:<region>:<account>:accesspoint/<name>/<key>, of an Outpost or Object Lambda likewise; s3fs allows
# a colon for each of these slashes.
_ACCESS_POINT = re.compile(
    r"(arn:aws[^:/]*:s3[^/:]*:[^/:]*:[^/:]*:(?:outpost[/:][^/:]+[/:](?:bucket|accesspoint)|accesspoint)[/:][^/:]+)"
    r"[/:]?(.*)",
    re.DOTALL,
)


class _Process:
    """What belongs to this process: filesystems by their options."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.filesystems: dict[str, Any] = {}


_process = _Process()


def _forget_after_fork() -> None:
    # Sockets, the loop's thread and a lock that another thread held belong to the parent.
    global _process  # noqa: PLW0603 - one process, one set of filesystems
    _process = _Process()


os.register_at_fork(after_in_child=_forget_after_fork)


class S3Client:
    """Calls to S3 by the name botocore gives them ("get_object"), with ptbin's errors and retries."""

    def __init__(self, options: Mapping[str, Any], *, retry: RetryPolicy | None = None) -> None:
        self.options = read_options(options)
        self.retry = retry or RetryPolicy()
        # Values may be unhashable; their text tells two sets of options apart and stays in this process.
        self._key = repr(sorted((name, repr(value)) for name, value in options.items()))

    @property
    def fs(self) -> Any:
        """The connected `S3FileSystem` of this process, shared by all with the same options."""
        process = _process
        found = process.filesystems.get(self._key)
        if found is None:
            with process.lock:
                found = process.filesystems.get(self._key)
                if found is None:
                    found = process.filesystems[self._key] = self._connect()
        return found

    def _connect(self) -> Any:
        from botocore.exceptions import BotoCoreError
        from s3fs import S3FileSystem

        try:
            fs = S3FileSystem(**self.options.s3fs)
            fs.retries = 1
            fs.connect()
        except (TypeError, ValueError, KeyError, AttributeError, BotoCoreError) as error:
            # Not its text: some of these quote the options.
            unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
            named = f": {unknown[1]}" if unknown else ""
            where = "; AWS_ENDPOINT_URL and ~/.aws/config count as well" if not named else ""
            raise UsageError(f"the storage options for S3 are not what s3fs takes{named}{where}") from error
        return fs

    @property
    def endpoint_url(self) -> str:
        """Where requests go, whether options, environment or a file say so."""
        return str(self.fs.s3.meta.endpoint_url)

    @property
    def equal_parts(self) -> bool:
        """Whether the store wants every part of an upload but the last to have one size."""
        return self.options.wants_equal_parts(self.endpoint_url)

    @property
    def streams_bodies(self) -> bool:
        """Whether bodies may be sent block by block: nothing has to be computed from them before."""
        config = self.fs.s3.meta.config
        return (
            not (config.s3 or {}).get("payload_signing_enabled")
            and config.request_checksum_calculation == "when_required"
        )

    def reaches_same_store(self, other: S3Client) -> bool:
        """Whether both talk to one endpoint (their credentials may differ)."""
        return self.endpoint_url == other.endpoint_url

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where calls are made: fsspec's, in a thread of its own."""
        loop: asyncio.AbstractEventLoop = self.fs.loop
        return loop

    def start(self, work: Callable[[], Coroutine[Any, Any, T]]) -> Future[T]:
        """Run `work` on the filesystem's loop; returns at once. The limits of this context go along.

        Raises:
            RuntimeError: called on that very loop, where waiting for the result would last for ever.
        """
        loop = self.loop
        if asyncio._get_running_loop() is loop:  # noqa: SLF001 - as get_running_loop, which raises for none
            raise RuntimeError("a store is asked to wait on fsspec's event loop: call it from another thread")
        return asyncio.run_coroutine_threadsafe(work(), loop)

    def call(self, method: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """One S3 call, repeated where that may help; `uri` is for the message."""
        return self.repeated(partial(self.attempt, method, uri, **parameters))

    async def acall(self, method: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """As `call`, on the loop."""
        return await self.arepeated(partial(self.attempt, method, uri, **parameters))

    def repeated(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Wait for `operation`, again where that may help."""
        return wait_for(self.start(partial(self.arepeated, operation)))

    async def arepeated(self, operation: Callable[[], Awaitable[T]]) -> T:
        """As `repeated`, on the loop."""
        return await call_with_retries_async(operation, self.retry)

    async def attempt(self, method: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """As `acall`, tried once."""
        async with request_slot():
            with mapped_faults(DOING.get(method, "write"), uri):
                return await self.send(method, parameters)

    async def fetch(
        self,
        uri: str,
        accept: Accept,
        consume: Consume,
        **parameters: Any,
    ) -> None:
        """One GET, tried once; its body goes to `consume` in blocks, which holds it up where it awaits.

        `accept` looks at the answer before its body is read, and raises to refuse it; the connection is
        then cut, or else goes back to the pool.
        """
        async with request_slot():
            with mapped_faults("read", uri):
                answer = await self.send("get_object", parameters)
                body = answer["Body"]
                try:
                    accept(answer)
                    while block := await body.read(BLOCK_NBYTES):
                        waits = consume(block)
                        if waits is not None:
                            await waits
                finally:
                    body.close()

    async def send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One request; every one passes here. Raises what botocore raises."""
        try:
            answer: dict[str, Any] = await self.fs._call_s3(method, **parameters)  # noqa: SLF001 - see above
        except OSError as error:
            # s3fs translates into errno; botocore's own says more.
            cause = error.__cause__
            if cause is not None and isinstance(getattr(cause, "response", None), dict):
                raise cause from None
            raise
        return answer


@dataclass(frozen=True, slots=True)
class S3Object:
    """One key, and the client that asks for it."""

    client: S3Client
    uri: str
    bucket: str
    key: str

    @classmethod
    def of_path(cls, client: S3Client, path: str) -> S3Object:
        """Of "bucket/key"; access points' names hold slashes of their own.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-points-naming.html
        """
        match = _ACCESS_POINT.match(path)
        bucket, _, key = path.partition("/") if match is None else (match[1], "", match[2])
        return cls(client, f"s3://{path}", bucket, key)

    @property
    def prefix(self) -> str:
        """Of the keys below this one."""
        return self.key if not self.key or self.key.endswith("/") else f"{self.key}/"

    @property
    def names(self) -> dict[str, str]:
        """As arguments of a call."""
        return {"Bucket": self.bucket, "Key": self.key}

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self.client.call(method, self.uri, **self.names, **parameters)

    async def acall(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self.client.acall(method, self.uri, **self.names, **parameters)

    async def attempt(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self.client.attempt(method, self.uri, **self.names, **parameters)

    async def fetch(self, accept: Accept, consume: Consume, **parameters: Any) -> None:
        await self.client.fetch(self.uri, accept, consume, **self.names, **parameters)
