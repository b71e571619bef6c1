"""The process that stand-ins for Python (`tests.warm_python`) are forked from, and how a forked one begins.

Each kind of command has a process of its own to fork from, with what such commands import: what a process
starts with depends on its own command, not on what ran before it. The modules of this project are imported
anew each time, as in a new interpreter, and Prefect reads its settings when it is imported.

    python -P warm_forks.py FOLDER      # listens there; ends when its standard input does, with all it forked
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import ctypes
import fcntl
import gc
import importlib
import importlib.machinery
import io
import logging
import marshal
import multiprocessing.spawn
import os
import re
import resource
import runpy
import selectors
import signal
import socket
import sys
import threading
import types
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["KINDS", "LIMITS", "parent_of"]

KINDS = {
    "server": (
        ["embedded_server.py", "prefect server "],
        ["prefect.server.api.server", "prefect.server.services", "uvicorn"]),
    "mlflow": (
        ["mlflow"],
        ["mlflow.cli", "mlflow.pytorch", "mlflow.store.tracking.sqlalchemy_store", "flask", "graphene",
         "uvicorn"]),
    "worker": (
        [" worker ", " work-pool ", " deploy "],  # each imports all collections that are installed
        [f"prefect_{name}" for name in ("aws", "dask", "docker", "gcp", "kubernetes", "ray", "redis")]),
    "restoring": (
        ["ptbin.restoring"],
        ["torch._functorch._aot_autograd.graph_compile",  # most of torch.export, and what compares outputs
         "networkx",  # torch.export's, late
         "transformers.models.llama.modeling_llama"]),
    "any": (
        [""],
        [*(f"flows.{name}" for name in ("cli", "convert", "migrate", "restore", "sync", "verify")),
         "prefect.runner", "prefect.workers.process", "prefect.cli", "rich.progress"]),
}  # fmt: skip
"""A command is of the first kind of which something occurs in it. Its process is forked with the modules of
that kind, and of the last."""
BIN = Path(sys.executable).parent
ANEW = re.compile(r"(ptbin|tasks|flows|mlflow\.server|huggingface_hub)\b")
"""What each process imports by itself: this project, and what reads the environment when it is imported."""
OWN_PATH = tuple(sys.path[1:] if not sys.flags.safe_path else sys.path)
"""What the interpreter itself looks for modules in: some that are imported add to it (Ray)."""
PR_SET_NAME = 15  # linux/prctl.h
LIMITS = 16  # RLIM_NLIMITS, asm-generic/resource.h


class _Request(NamedTuple):
    words: list[str]
    environment: dict[str, str]
    folder: str
    stand_in: int
    passed: list[int]
    ignored: list[int]
    mask: int
    limits: list[tuple[int, int]]
    received: list[int]


class _Forks:
    """What runs, by descriptors that tell when it ends (`pidfd_open`), and whose stand-in waits."""

    def __init__(self, folder: Path) -> None:
        self._listeners: dict[str, socket.socket] = {}
        for kind in KINDS:
            self._listeners[kind] = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._listeners[kind].bind(str(folder / kind))
            self._listeners[kind].listen(64)
        self._kinds: list[int] = []
        self._watch()

    def _watch(self) -> None:
        """Wait for stand-ins of these kinds, and for the end. Nothing runs yet."""
        self._running: dict[int, tuple[int, socket.socket]] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(0, selectors.EVENT_READ)
        for kind, listener in self._listeners.items():
            self._selector.register(listener, selectors.EVENT_READ, kind)

    def serve(self) -> _Request | None:
        """Fork for each stand-in. Returns what it asked for, in the forked process; None at the end."""
        while True:
            for key, _ in self._selector.select():
                if self._selector.get_map().get(key.fd) is not key:
                    continue  # it went with one before it
                if key.fd == 0:
                    self._end()
                    return None
                if key.fd in self._running:
                    self._ended(key.fd)
                elif key.data in self._listeners:
                    if request := self._asked(key.data):
                        return request
                else:  # killed
                    os.kill(self._running[key.data][0], signal.SIGKILL)
                    self._selector.unregister(key.fd)

    def _asked(self, kind: str) -> _Request | None:
        """The request, in the forked process."""
        _import("any")
        if len(self._listeners) > 1 and kind != "any":
            self._fork_for(kind)
            return None
        connection, _ = self._listeners[kind].accept()
        request = _receive(connection)
        if request is None:
            return None
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

    def _fork_for(self, kind: str) -> None:
        """From now on another process, which begins here, serves this kind."""
        listener = self._listeners.pop(kind)
        pid = os.fork()
        if pid:
            self._kinds.append(pid)
            self._selector.unregister(listener)
            listener.close()
            return
        self._selector.close()
        for other in (*self._listeners.values(), *(connection for _, connection in self._running.values())):
            other.close()
        for descriptor in self._running:
            os.close(descriptor)
        self._kinds, self._listeners = [], {kind: listener}
        self._watch()
        _import(kind)

    def _end(self) -> None:
        """Nothing that was forked from here outlives this process."""
        for pid, _ in self._running.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for pid in self._kinds:
            os.waitpid(pid, 0)

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


def _import(kind: str) -> None:
    """What processes of a kind are forked with, once."""
    if kind in _imported:
        return
    before = dict(os.environ)
    _imported.add(kind)
    for name in KINDS[kind][1]:
        importlib.import_module(name)
    _set_by_imports.update({name: value for name, value in os.environ.items() if before.get(name) != value})
    for name in filter(ANEW.match, list(sys.modules)):
        del sys.modules[name]
    assert threading.active_count() == 1
    gc.collect()
    gc.freeze()  # else each process goes through all of it, and copies its pages


_imported: set[str] = set()
_set_by_imports: dict[str, str] = {}


# -- a forked process --------------------------------------------------------------------------------


def _run(request: _Request) -> None:
    """Be the process that the stand-in stands for, and end as the interpreter does."""
    status, interrupted = 1, False
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
        if status and status is not error.code:
            sys.stderr.write(f"{error.code}\n")
    except BaseException as error:  # noqa: BLE001 - as the interpreter ends
        sys.excepthook(type(error), error, error.__traceback__)
        interrupted = isinstance(error, KeyboardInterrupt)
    with contextlib.suppress(KeyboardInterrupt):
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
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
    for number, limit in enumerate(request.limits):
        resource.setrlimit(number, limit)
    os.chdir(request.folder)
    os.environ.clear()
    os.environ.update(_set_by_imports | request.environment)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    _open_streams()
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
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


def _open_streams() -> None:
    """Standard input, output and error, as the interpreter does (`create_stdio` in its pylifecycle.c)."""
    encoding, _, errors = os.environ.get("PYTHONIOENCODING", "").partition(":")
    encoding, errors = codecs.lookup(encoding or "utf-8").name, errors or sys.stdin.errors or "strict"
    at_once = bool(os.environ.get("PYTHONUNBUFFERED"))

    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        raw = io.FileIO(descriptor, "w" if descriptor else "r", closefd=False)
        raw.name = f"<{name}>"
        stream: Any = raw  # one that writes at once has no buffer
        if not (descriptor and at_once):
            stream = io.BufferedWriter(raw) if descriptor else io.BufferedReader(raw)
        stream = io.TextIOWrapper(
            stream,
            encoding,
            errors if descriptor < 2 else "backslashreplace",
            "\n" if descriptor else None,
            line_buffering=not at_once and (descriptor == 2 or raw.isatty()),
            write_through=at_once,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def parent_of(pid: int) -> int:
    """The parent of a process; that of a forked one is its stand-in.

    Raises:
        OSError: there is no such process.
    """
    before, _, after = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    name = before.partition("(")[2]
    return int(name.removeprefix("warm ")) if name.startswith("warm ") else int(after.split()[1])


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
    os._exit(0)  # what was imported is not asked to end: it began nothing
