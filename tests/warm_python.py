"""Programs that stand in for Python: they are forked from a process that has imported Prefect already.

Importing Prefect's client costs 1.2 s of a core, its server 3.5 s, torch 1.3 s, and the suite starts hundreds
of processes that do. `warm_python` gives a folder of stand-ins: `python`, and each script of this environment
by its name. A stand-in sends what it was given (words, environment, working folder, descriptors) to the
process that forks, passes on its signals, ends as the forked process ends, and takes it along when it is
killed. There `sys.executable` is a stand-in as well, for what that process starts.

The modules of this project are imported anew each time, as in a new interpreter, and Prefect reads its
settings when it is imported. Not tried is what happens while an interpreter starts; and the forked process is
not a child of the one that started the stand-in. Tests that are about either use `sys.executable`.

    python -P warm_python.py FOLDER      # the process to fork from; ends when its standard input does
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.machinery
import logging
import marshal
import multiprocessing.spawn
import os
import re
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["VARIABLE", "is_stand_in", "parent_of", "stand_in", "warm_path", "warm_python"]

VARIABLE = "PTBIN_TEST_WARM_PYTHON"
"""Names the folder of stand-ins, to the processes of pytest-xdist as well."""
BIN = Path(sys.executable).parent
ANEW = re.compile(r"(ptbin|tasks|flows|mlflow\.server|huggingface_hub)\b")
"""What each process imports by itself: this project, and what reads the environment when it is imported."""
OWN_PATH = tuple(sys.path[1:] if not sys.flags.safe_path else sys.path)
"""What the interpreter itself looks for modules in: some that are imported add to it (Ray)."""
PR_SET_NAME = 15  # linux/prctl.h
IMPORTED = {
    r"": [*(f"flows.{name}" for name in ("cli", "convert", "migrate", "restore", "sync", "verify")),
          "prefect.runner", "prefect.workers.process", "prefect.cli", "rich.progress"],
    r"embedded_server\.py| server ": ["prefect.server.api.server", "prefect.server.services", "uvicorn"],
    r"\bwork(er|-pool) |\bdeploy ": [  # each imports all collections that are installed
        f"prefect_{name}" for name in ("aws", "dask", "docker", "gcp", "kubernetes", "ray", "redis")],
    r"ptbin\.restoring": ["torch"],
    r"mlflow": ["mlflow.cli", "mlflow.pytorch", "mlflow.store.tracking.sqlalchemy_store", "flask", "graphene",
                "uvicorn"],
}  # fmt: skip
"""What a process is forked with, by what occurs in its command."""
QUIET = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

STAND_IN = """#!{python} -IS
import _socket, marshal, os, signal, sys

FORWARDED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is a process that they can be sent to
ignored = [int(number) for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
mask = os.umask(0)
os.umask(mask)
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
server.connect({address!r})
there = [int(name) for name in os.listdir("/proc/self/fd")]
passed = [fd for fd in there if fd != server.fileno() and os.path.exists(f"/proc/self/fd/{{fd}}")]
data = marshal.dumps((sys.argv, dict(os.environ), os.getcwd(), os.getpid(), passed, ignored, mask))
rights = b"".join(fd.to_bytes(4, sys.byteorder) for fd in passed)
server.sendmsg([len(data).to_bytes(8, "little")], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
while data:
    data = data[server.send(data):]
for fd in passed:
    if fd > 2:
        os.close(fd)
pid = int.from_bytes(server.recv(8), "little")
for number in FORWARDED:
    if pid and number not in ignored:
        signal.signal(number, lambda number, frame: os.kill(pid, number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)
answer = server.recv(8)
status = int.from_bytes(answer, "little", signed=True) if answer else 255
if status < 0:
    if -status != signal.SIGKILL:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""


# -- in the suite ------------------------------------------------------------------------------------


@contextlib.contextmanager
def warm_python() -> Iterator[Path]:
    """The folder of stand-ins, while the context lasts. Nothing is imported before the first one runs."""
    with tempfile.TemporaryDirectory(prefix="ptbin-warm-") as name:
        folder = Path(name)
        command = [sys.executable, "-P", __file__, str(folder)]
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PREFECT"))}
        process = subprocess.Popen(
            command,
            env=kept | QUIET | {"PREFECT_HOME": str(folder / "home")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        text = STAND_IN.format(python=sys.executable, address=str(folder / "socket"))
        (folder / "bin").mkdir()
        for program in ("python", "python3", *_scripts()):
            (folder / "bin" / program).write_text(text)
            (folder / "bin" / program).chmod(0o755)
        os.environ[VARIABLE] = str(folder / "bin")
        try:
            yield folder / "bin"
        finally:
            del os.environ[VARIABLE]
            process.stdin.close()
            process.stdout.close()
            process.wait()


def stand_in(program: str = "python") -> str:
    """The path of a stand-in; outside the suite (the demos) that of the program itself."""
    return f"{os.environ.get(VARIABLE, BIN)}/{program}"


def warm_path() -> str:
    """The beginning of a PATH: the stand-ins, and what else this environment has."""
    return f"{os.environ[VARIABLE]}{os.pathsep}{BIN}"


def is_stand_in(program: str) -> bool:
    """Whether a path is that of a stand-in."""
    return program.startswith(os.environ[VARIABLE])


def parent_of(pid: int) -> int:
    """The parent of a process; that of a forked one is its stand-in.

    Raises:
        OSError: there is no such process.
    """
    before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    name = before.partition("(")[2]
    return int(name.removeprefix("warm ")) if name.startswith("warm ") else int(after.split()[1])


def _scripts() -> Iterator[str]:
    first = f"#!{sys.executable}\n".encode()
    for path in filter(Path.is_file, BIN.iterdir()):
        with path.open("rb") as file:
            if file.read(len(first)) == first:
                yield path.name


# -- the process to fork from ------------------------------------------------------------------------


class _Request(NamedTuple):
    words: list[str]
    environment: dict[str, str]
    folder: str
    stand_in: int
    passed: list[int]
    ignored: list[int]
    mask: int
    received: list[int]


class _Forks:
    """What runs, by descriptors that tell when it ends (`pidfd_open`), and whose stand-in waits."""

    def __init__(self, folder: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / "socket"))
        self._listener.listen(64)
        self._running: dict[int, tuple[int, socket.socket]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)

    def serve(self) -> _Request | None:
        """Fork for each stand-in. Returns what it asked for, in the forked process; None at the end."""
        while True:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is not key:
                    continue  # it went with one before it
                if key.fd == 0:
                    for pid, _ in self._running.values():
                        os.kill(pid, signal.SIGKILL)
                        os.waitpid(pid, 0)
                    return None
                if key.fd in self._running:
                    self._ended(key.fd)
                elif key.fileobj is not self._listener:  # killed
                    os.kill(self._running[key.data][0], signal.SIGKILL)
                    self._selector.unregister(key.fd)
                elif request := self._asked():
                    return request

    def _asked(self) -> _Request | None:
        """The request, in the forked process."""
        connection, _ = self._listener.accept()
        request = _receive(connection)
        if request is None:
            return None
        _import_for(" ".join(request.words))
        pid = os.fork()
        if not pid:
            return request
        for descriptor in request.received:
            os.close(descriptor)
        ended = os.pidfd_open(pid)
        self._running[ended] = pid, connection
        self._selector.register(ended, selectors.EVENT_READ)
        self._selector.register(connection, selectors.EVENT_READ, ended)
        with contextlib.suppress(OSError):
            connection.sendall(pid.to_bytes(8, "little"))
        return None

    def _ended(self, descriptor: int) -> None:
        pid, connection = self._running.pop(descriptor)
        _, status = os.waitpid(pid, 0)
        with contextlib.suppress(OSError):
            connection.sendall(os.waitstatus_to_exitcode(status).to_bytes(8, "little", signed=True))
        self._selector.unregister(descriptor)
        os.close(descriptor)
        with contextlib.suppress(KeyError):
            self._selector.unregister(connection)
        connection.close()


def _receive(connection: socket.socket) -> _Request | None:
    """What a stand-in asks for; None where it was killed before it could."""
    head, received, _, _ = socket.recv_fds(connection, 8, 250)
    wanted, data = int.from_bytes(head, "little"), b""
    while len(data) < wanted and (more := connection.recv(wanted - len(data))):
        data += more
    if not data or len(data) < wanted:
        return None
    return _Request._make([*marshal.loads(data), received])  # noqa: S302 - from our own stand-in


def _import_for(command: str) -> None:
    for pattern in [pattern for pattern in IMPORTED if re.search(pattern, command)]:
        for name in IMPORTED.pop(pattern):
            importlib.import_module(name)
        for name in filter(ANEW.match, list(sys.modules)):
            del sys.modules[name]
        assert threading.active_count() == 1
        gc.collect()
        gc.freeze()


# -- a forked process --------------------------------------------------------------------------------


def _run(request: _Request) -> None:
    """Be the process that the stand-in stands for, and end as the interpreter does."""
    status = 1
    try:
        _take_over(request)
        program, *words = request.words
        if Path(program).name.startswith("python"):
            _interpret(words)
        else:
            sys.argv = [str(BIN / Path(program).name), *words]
            runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            sys.stderr.write(f"{error.code}\n")
    except BaseException as error:  # noqa: BLE001 - as the interpreter ends
        traceback.print_exc()
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    with contextlib.suppress(KeyboardInterrupt):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status & 0xFF)


def _take_over(request: _Request) -> None:
    """What a program gets from the one that starts it."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_NAME, f"warm {request.stand_in}".encode(), 0, 0, 0)
    moved = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 700) for descriptor in request.received]
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if int(name) < 700:
                os.close(int(name))
    for wanted, descriptor in zip(request.passed, moved, strict=True):
        os.dup2(descriptor, wanted)
        os.close(descriptor)
    os.umask(request.mask)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(request.environment)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    sys.stdin = os.fdopen(0, closefd=False)
    at_once = os.isatty(1) or "PYTHONUNBUFFERED" in os.environ
    sys.stdout = os.fdopen(1, "w", 1 if at_once else -1, closefd=False)
    sys.stderr = os.fdopen(2, "w", 1, errors="backslashreplace", closefd=False)
    logging.getLogger().handlers.clear()
    os.getppid = lambda: _parent_of(request.stand_in)
    sys.path.sort(key=lambda name: name not in OWN_PATH)  # what was added comes last
    sys.executable = str(Path(request.words[0]).with_name("python"))
    multiprocessing.spawn.set_executable(sys.executable)
    held = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "prefect"}
    held.pop("prefect.engine", None)  # it is run
    for name in held:
        del sys.modules[name]
    sys.meta_path.insert(0, _Held(held))


def _parent_of(pid: int) -> int:
    with contextlib.suppress(OSError):
        return parent_of(pid)
    return 1


def _interpret(words: list[str]) -> None:
    """What the interpreter does with its command line."""
    flags = set()
    while words[0] in {"-I", "-P", "-B", "-u"}:
        flags.add(words.pop(0))
    kind = words.pop(0)
    path = (
        [] if "-I" in flags else [name for name in os.environ.get("PYTHONPATH", "").split(os.pathsep) if name]
    )
    if not flags & {"-I", "-P"} and "PYTHONSAFEPATH" not in os.environ:
        folder = {"-c": "", "-": "", "-m": os.getcwd()}
        path.insert(0, folder.get(kind, str(Path(kind).resolve().parent)))
    sys.path[:0] = path
    if path:
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ImportError):
            importlib.import_module("sitecustomize")
    if kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind in {"-c", "-"}:
        code = words.pop(0) if kind == "-c" else sys.stdin.read()
        sys.argv = [kind, *words]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))  # noqa: S102 - as Python does
    else:
        assert not kind.startswith("-"), f"{kind} is not known here"
        sys.argv = [kind, *words]
        runpy.run_path(kind, run_name="__main__")


class _Held:
    """Prefect's modules, kept back until one is imported: then Prefect reads its settings."""

    def __init__(self, modules: dict[str, types.ModuleType]) -> None:
        self._modules = modules
        self._spec = modules["prefect"].__spec__

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == "prefect" else None  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self._modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self._spec
        sys.meta_path.remove(self)
        sys.modules.update(self._modules)
        import prefect.context
        import prefect.logging.configuration as logs

        prefect.context.refresh_global_settings_context()
        logs.PROCESS_LOGGING_CONFIG.clear()
        logs.setup_logging()


if __name__ == "__main__":
    _forks = _Forks(Path(sys.argv[1]))  # what it has open stays so: its descriptors are taken in a fork
    print("ready", flush=True)  # noqa: T201 - for `warm_python`
    if _request := _forks.serve():
        _run(_request)
