"""The stand-ins for Python do what Python does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.prefect_stack import wait_for
from tests.warm_forks import parent_of
from tests.warm_python import stand_in

pytestmark = pytest.mark.starts_processes

ABOUT = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["SAID"], sys.stdin.read(), __name__, "prefect" in sys.modules)
print(sys.path[:1], os.umask(0), os.getppid() == int(os.environ["STARTED_BY"]), file=sys.stderr)
sys.exit(3)
"""
STATE = """
import logging, os, resource, signal, sys, threading, warnings
print(sorted((name, value) for name, value in os.environ.items() if name != "_"), sys.path, warnings.filters)
print([signal.getsignal(number) for number in sorted(signal.valid_signals() - {9, 19})], sys.excepthook)
print(logging.root.handlers, logging.root.level, logging.getLogRecordFactory(), sys.dont_write_bytecode)
print(threading.enumerate()[1:], warnings.formatwarning.__module__, sys.getrecursionlimit(), sys.warnoptions)
streams = sys.stdin, sys.stdout, sys.stderr
print([(s.name, s.encoding, s.errors, s.line_buffering, s.write_through) for s in streams])
print(streams == (sys.__stdin__, sys.__stdout__, sys.__stderr__), sorted(os.listdir("/proc/self/fd"))[:-1])
print([resource.getrlimit(number) for number in range(16)])
"""
"""What a process finds and an import may change."""
WAITS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.mark.parametrize(
    "given",
    [
        ["-P", "-c", ABOUT, "a"],
        ["-c", ABOUT],
        ["script.py", "b"],
        ["-m", "script"],
        ["-P", "-c", ABOUT, " worker "],  # after all that is imported for these: Ray adds a path
    ],
)
def test_all_that_a_program_is_given_is_as_with_python(given: list[str], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(ABOUT)
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment = kept | {"SAID": "so", "STARTED_BY": str(os.getpid())}
    answers = []
    for python in (sys.executable, stand_in()):
        done = subprocess.run(
            [python, *given], cwd=tmp_path, env=environment, input="heard", capture_output=True, text=True
        )
        answers.append((done.returncode, done.stdout, done.stderr))
    assert answers[0] == answers[1]
    assert answers[0][0] == 3


@pytest.mark.parametrize(
    "more",
    [{}, {"PYTHONIOENCODING": "latin-1:replace", "PYTHONUNBUFFERED": "1", "PYTHONDONTWRITEBYTECODE": "1"}],
)
def test_a_process_finds_what_python_gives_it(more: dict[str, str]) -> None:
    """Not what was imported for other commands: Ray sets a variable, a hook and a logger's factory."""
    subprocess.run([stand_in(), "-c", "", " worker "], check=True)
    kept = {name: value for name, value in os.environ.items() if name not in more}
    answers = [
        subprocess.run(
            ["prlimit", "--fsize=100000:200000", python, "-P", "-c", STATE],
            env=kept | more,
            input="",
            capture_output=True,
            text=True,
        )
        for python in (sys.executable, stand_in())
    ]
    assert answers[0].stdout.splitlines() == answers[1].stdout.splitlines(), answers[1].stderr


@pytest.mark.parametrize(
    "code", ["raise SystemExit('so')", "raise SystemExit(('so', 1))", "raise SystemExit"]
)
def test_the_end_is_as_with_python(code: str) -> None:
    answers = [
        subprocess.run([python, "-c", code], capture_output=True, text=True)
        for python in (sys.executable, stand_in())
    ]
    assert (answers[0].returncode, answers[0].stderr) == (answers[1].returncode, answers[1].stderr)


def test_an_error_is_told_and_is_the_status() -> None:
    done = subprocess.run([stand_in(), "-c", "raise ValueError('so')"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.endswith("ValueError: so\n")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_ends_both(number: signal.Signals) -> None:
    with subprocess.Popen(
        [stand_in(), "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        forked = int(process.stdout.readline())
        assert parent_of(forked) == process.pid
        process.send_signal(number)
        assert process.wait(600) == -number
        wait_for(lambda: not Path(f"/proc/{forked}").exists(), 600)


def test_prefect_reads_its_settings_when_it_is_imported(tmp_path: Path) -> None:
    code = """
import os
os.environ["PREFECT_HOME"] += "/home"
import prefect.settings
print(prefect.settings.get_current_settings().home)
"""
    for name in ("a", "b"):
        environment = os.environ | {"PREFECT_HOME": str(tmp_path / name)}
        (tmp_path / name).mkdir()
        done = subprocess.run([stand_in(), "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout == f"{tmp_path / name}/home\n", done.stderr
