"""One S3 client for each set of options and process, driven from ordinary threads.

Owns the making of the client (through s3fs, so that every storage option means what users of fsspec
expect), its defaults, and the one place where an S3 call is made, repeated and its failure translated.
Knows no reading or writing. All calls run on fsspec's event-loop thread; a caller gets a future and may
have as many under way as it likes. Making a client costs some 0.3 s, so stores share it.

botocore's and s3fs's own retries are switched off (unless options ask for them): two layers multiply the
attempts, and s3fs's repeats neither throttled nor half-received answers reliably. What remains below is
aiohttp, which repeats an idempotent request once where the connection breaks before an answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from typing import TYPE_CHECKING, Any

from ptbin.errors import UsageError
from ptbin.stores.faults import mapped_faults
from ptbin.stores.retry import RetryPolicy, call_with_retries_async

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from concurrent.futures import Future
    from typing import TypeVar

    T = TypeVar("T")

__all__ = ["S3Client"]

CONFIG_DEFAULTS: dict[str, Any] = {
    # Newer botocore sends and asks for checksums that several S3-compatible stores refuse.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
    # s3fs's 15 s are exceeded by CompleteMultipartUpload and part copies of some gigabytes.
    "read_timeout": 60,
    "connect_timeout": 10,
    "max_pool_connections": 32,
    "retries": {"total_max_attempts": 1, "mode": "standard"},
}

_lock = threading.Lock()
_filesystems: dict[str, Any] = {}


def _forget_after_fork() -> None:
    # Sockets, the event loop and a lock that another thread held belong to the parent.
    global _lock  # noqa: PLW0603 - one process, one lock
    _lock = threading.Lock()
    _filesystems.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(options)
    asked = merged.get("config_kwargs") or {}
    if not isinstance(asked, dict):
        raise UsageError("the storage option config_kwargs is not a mapping")
    merged["config_kwargs"] = {**CONFIG_DEFAULTS, **asked}
    merged["use_listings_cache"] = False
    merged["skip_instance_cache"] = True  # shared here, across threads; fsspec's cache is one for each
    merged.pop("asynchronous", None)
    return merged


class S3Client:
    """Calls to S3 by the name botocore gives them ("get_object"), with ptbin's errors and retries."""

    def __init__(self, options: Mapping[str, Any], *, retry: RetryPolicy | None = None) -> None:
        self._options = _with_defaults(options)
        self.retry = retry or RetryPolicy()

    @property
    def fs(self) -> Any:
        """The s3fs filesystem of this process."""
        import s3fs
        from fsspec.utils import tokenize

        key = tokenize(self._options)
        with _lock:
            if key not in _filesystems:
                try:
                    _filesystems[key] = s3fs.S3FileSystem(**self._options)
                except (TypeError, ValueError) as error:
                    # Not its text: some of these quote the options.
                    raise UsageError("the storage options for S3 are not what s3fs takes") from error
            return _filesystems[key]

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the client's loop; returns at once."""
        try:
            loop = self.fs.loop
        except BaseException:
            work.close()
            raise
        return asyncio.run_coroutine_threadsafe(work, loop)

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the client's loop and wait for it; interrupted, it is cancelled."""
        future = self.start(work)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def call(self, method: str, doing: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """One S3 call, waited for, repeated where that may help."""
        return self.wait(self.repeated(lambda: self.attempt(method, doing, uri, **parameters)))

    async def repeated(self, operation: Callable[[], Awaitable[T]]) -> T:
        return await call_with_retries_async(operation, self.retry)

    async def attempt(self, method: str, doing: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """One S3 call, tried once, on the client's loop; `doing` and `uri` are for the message."""
        with mapped_faults(doing, uri):
            fs = self.fs
            await fs.set_session()
            client = await fs.get_s3(parameters.get("Bucket"))
            bound = getattr(client, method)
            # Adds what the options ask of every request: RequestPayer, encryption, ACL.
            asked = fs._get_s3_method_kwargs(bound, **parameters)  # noqa: SLF001 - as s3fs's own files do
            answer: dict[str, Any] = await bound(**asked)
            return answer

    async def body(self, answer: Mapping[str, Any], doing: str, uri: str) -> bytes:
        """The whole content of a `get_object` answer; its connection goes back to the pool, or is cut."""
        with mapped_faults(doing, uri):
            async with contextlib.AsyncExitStack() as stack:
                stream = await stack.enter_async_context(answer["Body"])
                data: bytes = await stream.read()
                return data

    def split(self, path: str) -> tuple[str, str]:
        """(bucket, key) of a path; access points' names hold slashes of their own."""
        if path.startswith("arn:"):
            bucket, key = self.fs._find_bucket_key(path)  # noqa: SLF001 - four patterns not worth a copy
            return str(bucket), str(key)
        bucket, _, key = path.partition("/")
        return bucket, key
