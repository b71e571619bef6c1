"""Restore's child processes, forked from one that has imported torch already: a second or two less for each.

They are processes as before, with the descriptors, folder and environment that
`ptbin.restoring.children` gives them, and run the same modules as scripts. What an isolated interpreter finds
when it starts is not tried with them: `test_isolation` and the tests that kill start real ones.

    python -I -P warm_children.py SOCKET [MODULE...]

is the process to fork from; it ends when its standard input does.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

__all__ = ["Warm", "warm"]

REQUEST_NBYTES = 1 << 20
DESCRIPTORS = 16


class Warm:
    """In the place of the module `subprocess` in `ptbin.restoring.children`."""

    PIPE = subprocess.PIPE

    def __init__(self, address: str) -> None:
        self._address = address

    def Popen(
        self,
        words: Sequence[str],
        *,
        stdin: int,
        stdout: IO[bytes],
        stderr: IO[bytes],
        pass_fds: Sequence[int],
    ) -> _Forked:
        python, isolated, _, _, _, module, *_, answered = words
        assert (python, isolated, stdin, stderr) == (sys.executable, "-I", self.PIPE, stdout)
        return _Forked(self._address, module, answered, stdout.fileno(), pass_fds)


class _Forked:
    """As much of `subprocess.Popen` as is asked for."""

    def __init__(self, address: str, module: str, answered: str, log: int, passed: Sequence[int]) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.connect(address)
        read, write = os.pipe()
        self.stdin = os.fdopen(write, "wb")
        request = {
            "module": module,
            "answered": answered,
            "passed": list(passed),
            "folder": os.getcwd(),
            "environment": dict(os.environ),
        }
        socket.send_fds(self._server, [json.dumps(request).encode()], [read, log, *passed])
        self._server.shutdown(socket.SHUT_WR)
        os.close(read)
        self._answers = self._server.makefile("r")
        self._pid = int(self._answers.readline())

    def wait(self) -> int:
        if self.returncode is None:
            self.returncode = int(self._answers.readline())
            self._answers.close()
            self._server.close()
        return self.returncode

    def poll(self) -> int | None:
        """None unless somebody has waited: who asks kills it then, which does no harm to one that is gone."""
        return self.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)


@contextlib.contextmanager
def warm(folder: Path, *modules: str) -> Iterator[Warm]:
    """The process to fork from, with torch and these modules, while the context lasts."""
    address = str(folder / "warm")
    process = subprocess.Popen(
        [sys.executable, "-I", "-P", __file__, address, *modules],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n"
        yield Warm(address)
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(60)


def _serve(address: str, modules: Sequence[str]) -> None:
    import select

    import ptbin.restoring.filling
    import ptbin.restoring.fitting
    import ptbin.restoring.saving
    import ptbin.restoring.user_code  # noqa: F401

    for module in modules:
        importlib.import_module(module)
    gc.freeze()  # else each child goes through all of it, and copies its pages

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)  # noqa: T201 - for `warm`
        while sys.stdin.fileno() not in select.select([sys.stdin.fileno(), listener], [], [])[0]:
            connection, _ = listener.accept()
            if not os.fork():
                listener.close()
                _answer(connection)
                os._exit(0)
            connection.close()


def _answer(connection: socket.socket) -> None:
    """Fork the child, tell its process id, and how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    data, descriptors, _, _ = socket.recv_fds(connection, REQUEST_NBYTES, DESCRIPTORS)
    while more := connection.recv(REQUEST_NBYTES):
        data += more
    request = json.loads(data)
    pid = os.fork()
    if not pid:
        connection.close()
        _run(request, descriptors)
    for descriptor in descriptors:
        os.close(descriptor)
    connection.sendall(f"{pid}\n".encode())
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def _run(request: dict[str, Any], descriptors: list[int]) -> None:
    import runpy
    import traceback

    moved = _moved(descriptors)
    read, log, *passed = moved
    os.dup2(read, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    for wanted, descriptor in zip(request["passed"], passed, strict=True):
        os.dup2(descriptor, wanted)
    for descriptor in moved:
        os.close(descriptor)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdin = os.fdopen(0, "r", closefd=False)
    sys.argv = ["-c", request["answered"]]
    status = 1
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # noqa: BLE001 - as the interpreter ends
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _moved(descriptors: list[int]) -> list[int]:
    """The same files under numbers that no request asks for."""
    import fcntl

    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 500) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    return moved


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2:])
