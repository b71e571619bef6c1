"""The stand-ins for Python do what Python does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers.prefect_stack import wait_for
from tests.warm_python import parent_of, stand_in

pytestmark = pytest.mark.starts_processes

ABOUT = """
import os, sys
print(sys.argv, os.getcwd(), os.environ["SAID"], sys.stdin.read(), __name__, "prefect" in sys.modules)
print(sys.path[:1], os.umask(0), os.getppid() == int(os.environ["STARTED_BY"]), file=sys.stderr)
sys.exit(3)
"""
WAITS = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.mark.parametrize(
    "given",
    [
        ["-P", "-c", ABOUT, "a"],
        ["-c", ABOUT],
        ["script.py", "b"],
        ["-m", "script"],
        ["-P", "-c", ABOUT, " worker ", "mlflow"],  # after all that is imported for these: Ray adds a path
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
