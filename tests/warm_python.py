"""Programs that stand in for Python: they are forked from a process that has imported Prefect already.

Importing Prefect's client costs 1.2 s of a core, its server 3.5 s, torch 1.3 s, and the suite starts hundreds
of processes that do. `warm_python` gives a folder of stand-ins: `python`, and each script of this environment
by its name. A stand-in sends what it was given (words, environment, working folder, descriptors) to the
process that forks, passes on its signals, ends as the forked process ends, and takes it along when it is
killed. There `sys.executable` is a stand-in as well, for what that process starts.

Not as with Python: what happens while an interpreter starts; the seed of its hashes, which all share; options
and PYTHON* variables that are not named here; and the forked process is not a child of the one that started
the stand-in, and ends a moment later than a stand-in that is killed. Tests that are about any of these use
`sys.executable`.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests import warm_forks

__all__ = ["VARIABLE", "is_stand_in", "stand_in", "warm_path", "warm_python"]

VARIABLE = "PTBIN_TEST_WARM_PYTHON"
"""Names the folder of stand-ins, to the processes of pytest-xdist as well."""
BIN = Path(sys.executable).parent
QUIET = {
    "GIT_PYTHON_REFRESH": "quiet",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}

STAND_IN = """#!{python} -IS
import _socket, marshal, os, resource, signal, sys

FORWARDED = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is a process that they can be sent to
ignored = [int(number) for number in FORWARDED if signal.getsignal(number) == signal.SIG_IGN]
mask = os.umask(0)
os.umask(mask)
limits = [resource.getrlimit(number) for number in range({limits})]
command = " ".join(sys.argv)
kind = next(kind for kind, marks in {marks!r}.items() if any(mark in command for mark in marks))
server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
server.connect({folder!r} + "/" + kind)
there = [int(name) for name in os.listdir("/proc/self/fd")]
passed = [fd for fd in there if fd != server.fileno() and os.path.exists(f"/proc/self/fd/{{fd}}")]
data = marshal.dumps((sys.argv, dict(os.environ), os.getcwd(), os.getpid(), passed, ignored, mask, limits))
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


@contextlib.contextmanager
def warm_python() -> Iterator[Path]:
    """The folder of stand-ins, while the context lasts. Nothing is imported before the first one runs."""
    with tempfile.TemporaryDirectory(prefix="ptbin-warm-") as name:
        folder = Path(name)
        command = [sys.executable, "-P", warm_forks.__file__, str(folder)]
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
        marks = {kind: marks for kind, (marks, _) in warm_forks.KINDS.items()}
        given = {"python": sys.executable, "folder": name, "marks": marks, "limits": warm_forks.LIMITS}
        text = STAND_IN.format(**given)
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


def _scripts() -> Iterator[str]:
    first = f"#!{sys.executable}\n".encode()
    for path in filter(Path.is_file, BIN.iterdir()):
        with path.open("rb") as file:
            if file.read(len(first)) == first:
                yield path.name
