"""One S3 client for each set of options and process, used from ordinary threads.

Owns the making of the client (botocore's; `s3_options` says with what), and the one place where an S3 call is
made, limited, repeated and its failure translated. Knows no reading or writing. Several requests at once are
threads of one pool: measured against the same server, botocore in threads moves 1.1 to 1.7 times what
aiobotocore's event loop does and starts in a third of the time (docs/transfers.md).

botocore's own retries are switched off (unless options ask for them): two layers multiply the attempts, and
botocore does not repeat answers whose body breaks off.
"""

from __future__ import annotations

import contextvars
import os
import re
import threading
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from ptbin.errors import UsageError
from ptbin.stores.faults import mapped_faults
from ptbin.stores.limits import PROCESS_REQUESTS, request_slot
from ptbin.stores.retry import RetryPolicy, call_with_retries
from ptbin.stores.s3_options import read_options

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import TypeVar

    T = TypeVar("T")

__all__ = ["S3Client"]

BLOCK_NBYTES = 1 << 20
"""Bodies are read by such blocks, which stay in cache, and in memory that was used before. Read at
once, bodies of 8 MiB took twice the time, most of it the kernel's, for fresh pages."""

# arn:aws:s3:<region>:<account>:accesspoint/<name>/<key>, of an Outpost or Object Lambda likewise; s3fs allows
# a colon for each of these slashes.
_ACCESS_POINT = re.compile(
    r"(arn:aws[^:/]*:s3[^/:]*:[^/:]*:[^/:]*:(?:outpost[/:][^/:]+[/:](?:bucket|accesspoint)|accesspoint)[/:][^/:]+)"
    r"[/:]?(.*)",
    re.DOTALL,
)


class _Pool:
    """Threads that requests run on, as many as there is work for, up to a limit.

    Unlike those of `ThreadPoolExecutor` they do not keep the process alive: a run that is interrupted ends,
    though a server may leave some of its requests without an answer for minutes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        self._threads = 0
        self._waiting = 0  # work that no thread has taken yet, less idle threads

    def submit(self, work: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._work.put((future, work))
        with self._lock:
            self._waiting += 1
            if self._waiting > 0 and self._threads < self._limit:
                self._threads += 1
                self._waiting -= 1
                name = f"ptbin-s3-{self._threads}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            future, work = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:  # noqa: BLE001 - it is for whoever waits
                    future.set_exception(error)
            del future, work
            with self._lock:
                self._waiting -= 1


class _Process:
    """What belongs to this process: clients by their options, and the threads that requests run on."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.clients: dict[str, Any] = {}
        self.pool = _Pool(PROCESS_REQUESTS)


_process = _Process()


def _forget_after_fork() -> None:
    # Sockets, threads and a lock that another thread held belong to the parent.
    global _process  # noqa: PLW0603 - one process, one set of clients
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
    def boto(self) -> Any:
        """The botocore client of this process, shared by all with the same options."""
        with _process.lock:
            if self._key not in _process.clients:
                _process.clients[self._key] = self._connect()
            return _process.clients[self._key]

    def _connect(self) -> Any:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError

        config = dict(self.options.config)
        if self.options.anonymous:
            config["signature_version"] = UNSIGNED
        try:
            session = botocore.session.Session(profile=self.options.profile)
            return session.create_client("s3", config=Config(**config), **self.options.client)
        except (TypeError, ValueError, BotoCoreError) as error:
            # Not its text: some of these quote the options.
            raise UsageError("the storage options for S3 are not what s3fs takes") from error

    def reaches_same_store(self, other: S3Client) -> bool:
        """Whether both talk to one endpoint (their credentials may differ)."""
        return bool(self.boto.meta.endpoint_url == other.boto.meta.endpoint_url)

    def start(self, work: Callable[[], T]) -> Future[T]:
        """Run `work` on a thread of the pool; returns at once. The limits of this context go along."""
        return _process.pool.submit(partial(contextvars.copy_context().run, work))

    def call(self, method: str, doing: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """One S3 call, repeated where that may help."""
        return self.repeated(lambda: self.attempt(method, doing, uri, **parameters))

    def repeated(self, operation: Callable[[], T]) -> T:
        return call_with_retries(operation, self.retry)

    def attempt(self, method: str, doing: str, uri: str, **parameters: Any) -> dict[str, Any]:
        """One S3 call, tried once; `doing` and `uri` are for the message."""
        with request_slot(), mapped_faults(doing, uri):
            return self.send(method, parameters)

    def fetch(
        self,
        doing: str,
        uri: str,
        accept: Callable[[dict[str, Any]], None],
        consume: Callable[[bytes], None],
        **parameters: Any,
    ) -> None:
        """One GET, tried once; its body goes to `consume` in blocks.

        `accept` looks at the answer before its body is read, and raises to refuse it; the connection is
        then cut, or else goes back to the pool.
        """
        with request_slot(), mapped_faults(doing, uri):
            answer = self.send("get_object", parameters)
            body = answer["Body"]
            try:
                accept(answer)
                while block := body.read(BLOCK_NBYTES):
                    consume(block)
            finally:
                body.close()

    def send(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One request; every one passes here. Raises what botocore raises."""
        boto = self.boto
        if self.options.each_request:
            operation = boto.meta.service_model.operation_model(boto.meta.method_to_api_mapping[method])
            taken = operation.input_shape.members
            parameters = {
                **{name: value for name, value in self.options.each_request.items() if name in taken},
                **parameters,
            }
        answer: dict[str, Any] = getattr(boto, method)(**parameters)
        return answer

    def split(self, path: str) -> tuple[str, str]:
        """(bucket, key) of a path; access points' names hold slashes of their own.

        https://docs.aws.amazon.com/AmazonS3/latest/userguide/access-points-naming.html
        """
        match = _ACCESS_POINT.match(path)
        if match is not None:
            return match[1], match[2]
        bucket, _, key = path.partition("/")
        return bucket, key
