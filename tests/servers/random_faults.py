"""A fast HTTP proxy before a good S3 server that fails at random, as clouds do, in large doses.

    python -m tests.servers.random_faults --target URL --seed 1 --p503 0.05 --cut 0.02 --spike 0.01

prints its own URL, and at SIGTERM its `Counts` as JSON. With all probabilities 0 it is a relay that counts.
For faults at chosen requests see `faulty_proxy`.

Bodies are streamed through one buffer a connection, never kept whole; connections are kept alive on both
sides, one to the server for each from a client; `Expect: 100-continue` is passed on. The Host header stays
as it came, because S3 signatures cover it. Requests draw from one seeded generator in the order in which
they come: with a client that has many requests under way, that order differs from run to run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import signal
import socket
import struct
import sys
import threading
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["NO_FAULTS", "Counts", "Faults", "RandomFaults", "random_faults"]

BUFFER_NBYTES = 256 << 10
HEAD_LIMIT = 64 << 10
SLOW_DOWN = (
    b"<?xml version='1.0' encoding='UTF-8'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate.</Message></Error>"
)


@dataclass(frozen=True)
class Faults:
    """How often what happens: probabilities for each request, of which at most one comes true.

    `p503`: answered SlowDown, the server never sees it. `cut`: the connection is reset in the middle of
    the request's body or of the answer's (a coin tells which, where both have one; an answer without a
    body is lost whole). `spike`: `spike_s` seconds pass before the request goes on.
    """

    seed: int = 0
    p503: float = 0.0
    cut: float = 0.0
    spike: float = 0.0
    spike_s: float = 0.5


NO_FAULTS = Faults()


@dataclass
class Counts:
    """What came by; bytes are those on the clients' side, heads included."""

    requests: int = 0
    answered_503: int = 0
    cut_requests: int = 0
    cut_answers: int = 0
    spikes: int = 0
    bytes_from_clients: int = 0
    bytes_to_clients: int = 0

    @property
    def faults(self) -> int:
        return self.answered_503 + self.cut_requests + self.cut_answers + self.spikes

    @property
    def nbytes(self) -> int:
        return self.bytes_from_clients + self.bytes_to_clients

    def __sub__(self, earlier: Counts) -> Counts:
        return Counts(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


class _EndOfStreamError(Exception):
    """A connection ended where more was expected."""


@dataclass
class _Head:
    """The first lines of a request or an answer, as they came."""

    raw: bytes
    first: list[str]
    headers: dict[str, str]

    @classmethod
    def parse(cls, raw: bytes) -> _Head:
        first, *lines = raw[:-4].decode("latin-1").split("\r\n")
        pairs = (line.partition(":") for line in lines)
        return cls(raw, first.split(" "), {name.strip().lower(): value.strip() for name, _, value in pairs})

    @property
    def status(self) -> int:
        return int(self.first[1])

    @property
    def is_chunked(self) -> bool:
        return "chunked" in self.headers.get("transfer-encoding", "").lower()

    @property
    def length(self) -> int | None:
        """Bytes of the body by its header; None where there is none."""
        return int(self.headers["content-length"]) if "content-length" in self.headers else None

    @property
    def closes(self) -> bool:
        return "close" in self.headers.get("connection", "").lower()


@dataclass
class _Side:
    """One end of a connection: a non-blocking socket, and what was read of it beyond the last head."""

    sock: socket.socket
    sent: Callable[[int], None]
    received: Callable[[int], None]
    ahead: bytearray = field(default_factory=bytearray)

    async def _fill(self) -> bool:
        data = await asyncio.get_running_loop().sock_recv(self.sock, BUFFER_NBYTES)
        self.received(len(data))
        self.ahead += data
        return bool(data)

    async def until(self, mark: bytes) -> bytes:
        """Everything to the end of `mark`; empty where the connection ended before anything came."""
        while (found := self.ahead.find(mark)) < 0:
            if len(self.ahead) > HEAD_LIMIT:
                raise _EndOfStreamError
            if not await self._fill():
                if self.ahead:
                    raise _EndOfStreamError
                return b""
        end = found + len(mark)
        taken = bytes(self.ahead[:end])
        del self.ahead[:end]
        return taken

    async def send(self, data: bytes | bytearray | memoryview) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)
        self.sent(len(data))

    async def pump(self, nbytes: int | None, to: _Side | None, buffer: bytearray) -> None:
        """Pass that many bytes on (None: all until the end); `to` None drops them."""
        loop, view, rest = asyncio.get_running_loop(), memoryview(buffer), nbytes
        if self.ahead:
            taken = bytes(self.ahead[:rest])
            del self.ahead[: len(taken)]
            rest = None if rest is None else rest - len(taken)
            if to is not None:
                await to.send(taken)
        while rest is None or rest:
            wanted = len(view) if rest is None else min(rest, len(view))
            count = await loop.sock_recv_into(self.sock, view[:wanted])
            self.received(count)
            if not count:
                if rest is None:
                    return
                raise _EndOfStreamError
            if to is not None:
                await to.send(view[:count])
            rest = None if rest is None else rest - count

    async def pump_chunks(self, to: _Side | None, buffer: bytearray) -> None:
        """Pass a chunked body on as it is (RFC 9112, section 7.1)."""
        while True:
            line = await self.until(b"\r\n")
            size = int(line.partition(b";")[0], 16)
            if to is not None:
                await to.send(line)
            if size == 0:
                break
            await self.pump(size + 2, to, buffer)
        while True:  # trailers, to the empty line
            line = await self.until(b"\r\n")
            if to is not None:
                await to.send(line)
            if line in {b"\r\n", b""}:
                return

    def reset(self) -> None:
        """Close with RST instead of FIN: a linger of zero seconds (socket(7))."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def is_over(self) -> bool:
        """Whether the other end has closed meanwhile, which servers do with idle connections."""
        try:
            return not self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True


def _ignore(_: int) -> None:
    pass


class RandomFaults:
    """The proxy: `url` to talk to, `counts` of what came by, `struck`: which fault hit which request.

    `serve` runs it until it is cancelled.
    """

    def __init__(self, target: str, faults: Faults = NO_FAULTS) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname or "127.0.0.1", parts.port or 80)
        self.faults = faults
        self.counts = Counts()
        self.struck: list[str] = []
        self._random = random.Random(faults.seed)
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self._listener.setblocking(False)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    async def serve(self) -> None:
        loop, tasks = asyncio.get_running_loop(), set[asyncio.Task[None]]()
        try:
            while True:
                sock, _ = await loop.sock_accept(self._listener)
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                task = asyncio.create_task(self._connection(sock))
                tasks.add(task)
                task.add_done_callback(tasks.discard)
        finally:
            self._listener.close()
            for task in list(tasks):
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _count_from(self, nbytes: int) -> None:
        self.counts.bytes_from_clients += nbytes

    def _count_to(self, nbytes: int) -> None:
        self.counts.bytes_to_clients += nbytes

    async def _connection(self, sock: socket.socket) -> None:
        client = _Side(sock, sent=self._count_to, received=self._count_from)
        server: _Side | None = None
        buffer = bytearray(BUFFER_NBYTES)
        try:
            while raw := await client.until(b"\r\n\r\n"):
                if server is not None and server.is_over():
                    server.sock.close()
                    server = None
                if server is None:
                    server = await self._connect()
                if not await self._request(_Head.parse(raw), client, server, buffer):
                    break
        except (_EndOfStreamError, OSError, ValueError):
            # ValueError: what came is no HTTP. The other end learns it from the broken connection.
            client.reset()
        finally:
            for side in (client, server):
                if side is not None:
                    side.sock.close()

    async def _connect(self) -> _Side:
        sock = socket.socket()
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            await asyncio.get_running_loop().sock_connect(sock, self._target)
        except BaseException:
            sock.close()
            raise
        return _Side(sock, sent=_ignore, received=_ignore)

    async def _request(self, head: _Head, client: _Side, server: _Side, buffer: bytearray) -> bool:
        """One request and its answer; whether the connection lives on."""
        self.counts.requests += 1
        drawn, coin, where = self._random.random(), self._random.random(), self._random.random()
        faults = self.faults
        if drawn < faults.p503:
            self._strike("503", head)
            return await self._refuse(head, client, buffer)
        is_cut = drawn < faults.p503 + faults.cut
        if faults.p503 + faults.cut <= drawn < faults.p503 + faults.cut + faults.spike:
            self.counts.spikes += 1
            self._strike("late", head)
            await asyncio.sleep(faults.spike_s)
        if is_cut and head.length and coin < 0.5:
            self.counts.cut_requests += 1
            self._strike("request cut", head)
            await server.send(head.raw)
            if "expect" not in head.headers:
                await client.pump(int(head.length * where), server, buffer)
            server.reset()
            client.reset()
            return False
        await server.send(head.raw)
        answer = None
        if "expect" in head.headers:
            answer = await self._head_of_answer(server)
            if answer.status != 100:  # refused without a look at the body, which then never comes
                await self._answer(head, answer, client, server, buffer)
                return False
            await client.send(answer.raw)
        await _pump_body(head, client, server, buffer)
        answer = await self._head_of_answer(server)
        while answer.status < 200:
            await client.send(answer.raw)
            answer = await self._head_of_answer(server)
        if is_cut:
            self.counts.cut_answers += 1
            self._strike("answer cut", head)
            if answer.length and head.first[0] != "HEAD":
                await client.send(answer.raw)
                await server.pump(int(answer.length * where), client, buffer)
            server.reset()
            client.reset()
            return False
        return await self._answer(head, answer, client, server, buffer) and not head.closes

    def _strike(self, kind: str, head: _Head) -> None:
        self.struck.append(f"{kind}: {' '.join(head.first[:2])}")

    @staticmethod
    async def _head_of_answer(server: _Side) -> _Head:
        raw = await server.until(b"\r\n\r\n")
        if not raw:
            raise _EndOfStreamError
        return _Head.parse(raw)

    @staticmethod
    async def _answer(head: _Head, answer: _Head, client: _Side, server: _Side, buffer: bytearray) -> bool:
        """Pass an answer on; whether the connection to the server may be used again."""
        await client.send(answer.raw)
        if head.first[0] == "HEAD" or answer.status in {204, 304}:
            return not answer.closes
        if answer.is_chunked:
            await server.pump_chunks(client, buffer)
            return not answer.closes
        await server.pump(answer.length, client, buffer)
        return answer.length is not None and not answer.closes

    async def _refuse(self, head: _Head, client: _Side, buffer: bytearray) -> bool:
        """Answer 503. A body that is already on its way is read to its end, so that the answer arrives."""
        self.counts.answered_503 += 1
        expects = "expect" in head.headers
        if not expects:
            await _pump_body(head, client, None, buffer)
        body = b"" if head.first[0] == "HEAD" else SLOW_DOWN
        lines = [
            "HTTP/1.1 503 Slow Down",
            "Content-Type: application/xml",
            f"Content-Length: {len(SLOW_DOWN)}",
            *(["Connection: close"] if expects else []),
        ]
        await client.send("\r\n".join([*lines, "", ""]).encode() + body)
        return not expects and not head.closes


async def _pump_body(head: _Head, client: _Side, to: _Side | None, buffer: bytearray) -> None:
    if head.is_chunked:
        await client.pump_chunks(to, buffer)
    elif head.length:
        await client.pump(head.length, to, buffer)


@contextlib.contextmanager
def random_faults(target: str, faults: Faults = NO_FAULTS) -> Iterator[RandomFaults]:
    """A proxy to the server at `target`, on a thread of its own, until the block ends."""
    proxy = RandomFaults(target, faults)
    loop = asyncio.new_event_loop()
    serving = loop.create_task(proxy.serve())

    def run() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            loop.run_until_complete(serving)
        loop.close()

    thread = threading.Thread(target=run, name="random-faults", daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(serving.cancel)
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--target", required=True, help="URL of the server")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--p503", type=float, default=0.0)
    parser.add_argument("--cut", type=float, default=0.0)
    parser.add_argument("--spike", type=float, default=0.0)
    parser.add_argument("--spike-s", type=float, default=0.5)
    given = parser.parse_args()
    faults = Faults(given.seed, given.p503, given.cut, given.spike, given.spike_s)
    # Blocked before the thread starts, which inherits it: sigwait needs that in every thread.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    with random_faults(given.target, faults) as proxy:
        sys.stdout.write(proxy.url + "\n")
        sys.stdout.flush()
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    sys.stdout.write(json.dumps(asdict(proxy.counts)) + "\n")


if __name__ == "__main__":
    main()
