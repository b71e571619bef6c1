"""What a command line is given that is no plain text, and where words may come from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import ptbin
from flows.cli.app import run as run_command
from ptbin.catalog.named import NamedFiles, parse_lines
from ptbin.errors import UnsupportedTensorError, UsageError

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    torch.save({"w": torch.ones(2)}, tmp_path / "in" / "a.pt")
    return tmp_path / "in"


def named_by_bytes(folder: Path, name: bytes) -> Path:
    return folder / os.fsdecode(name)


@pytest.mark.parametrize("command", ["convert", "sync", "restore", "migrate", "status", "verify"])
@pytest.mark.parametrize("side", ["source", "dest"])
def test_a_folder_whose_name_is_not_text_is_refused_in_one_line(
    source: Path, tmp_path: Path, capsys: Captured, command: str, side: str
) -> None:
    odd = named_by_bytes(tmp_path, b"odd\xff")
    odd.mkdir()
    (odd / "a.pt").write_bytes((source / "a.pt").read_bytes())
    places = [odd, tmp_path / "out"] if side == "source" else [source, odd]
    words = [command, *map(str, places)] if command != "verify" else [command, str(odd)]
    assert run_command(words) == 2
    problems = capsys.readouterr().err.splitlines()
    assert [line for line in problems if "error" in line] == [problems[-1]]
    assert "the path is not UTF-8; rename the folder first" in problems[-1]
    assert sorted(path.name for path in odd.iterdir()) == ["a.pt"]


@pytest.mark.parametrize(("given", "missing"), [("until", "reason"), ("reason", "until")])
def test_an_option_that_is_required_and_missing_is_named(capsys: Captured, given: str, missing: str) -> None:
    assert run_command(["acknowledge", "out", "a.pt", f"--{given}", "2100-01-01"]) == 2
    said = capsys.readouterr().err
    assert said == f"ptbin: error: Missing option '--{missing}' (see ptbin acknowledge --help)\n"


def test_an_output_gets_no_name_that_its_manifest_cannot_state(source: Path, tmp_path: Path) -> None:
    for name in (b"two\nlines.bin", b"odd\xff.bin"):
        with pytest.raises(UsageError, match="choose another"):
            ptbin.convert(source / "a.pt", named_by_bytes(tmp_path, name))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_lists_of_files_may_hold_anything(source: Path) -> None:
    named = NamedFiles(parse_lines(b"\xef\xbb\xbfa.pt\r\nodd\xff.pt\n/in/a.pt\na\0b"))
    assert named.takes("a.pt")
    problems = named.missing(str(source))
    assert len(problems) == 3
    for problem in problems:
        problem.source.encode()
    assert sum("as it is called below SOURCE" in problem.detail for problem in problems) == 1


def test_a_name_that_safetensors_readers_refuse_is_refused(tmp_path: Path) -> None:
    torch.save({"w\udcff": torch.ones(2)}, tmp_path / "a.pt")
    ptbin.convert(tmp_path / "a.pt", tmp_path / "a.bin")
    assert list(torch.load(tmp_path / "a.bin", weights_only=True)) == ["w\udcff"]
    with pytest.raises(UnsupportedTensorError, match="not valid Unicode"):
        ptbin.convert(
            tmp_path / "a.pt", tmp_path / "a.safetensors", ptbin.ConvertOptions(format="safetensors")
        )
    ptbin.convert(
        tmp_path / "a.pt",
        tmp_path / "a.safetensors",
        ptbin.ConvertOptions(format="safetensors", rename=(("\udcff", ""),)),
    )


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("PTBIN_WORKERS", "many", ["convert", "in", "out"]),
        ("PTBIN_CONVERT_FORMAT", "zip", ["convert", "in", "out"]),
        ("PTBIN_FORMAT", "safetensors", ["convert", "in/a.pt", "a.bin"]),
        ("PTBIN_RENAME", "x", ["convert", "in/a.pt", "a.bin"]),
    ],
)
def test_a_wrong_value_out_of_the_environment_is_said_to_come_from_there(
    source: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    words: list[str],
) -> None:
    monkeypatch.chdir(source.parent)
    monkeypatch.setenv(variable, value)
    assert run_command(words) == 2
    assert capsys.readouterr().err.count(variable) == 1
    monkeypatch.delenv(variable)
    assert run_command(["convert", "in/a.pt", "b.bin", "--workers", "0"]) == 2
    assert "environment" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["--json", "convert", "a"], ["diff", "a", "b", "--json"], ["runs", "a", "--json"]]
)
def test_every_error_has_its_document(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_command(words) == 2
    document = json.loads(capsys.readouterr().out)
    assert (bool(document["reason"]), bool(document["detail"]), document["exit_status"]) == (True, True, 2)


# A Ctrl-C that comes while the command line is being imported, and one while the process ends.
INTERRUPTED = """
import atexit, os, signal, sys
from ptbin.__main__ import main
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "flows.cli":
            os.kill(os.getpid(), signal.SIGINT)
if sys.argv[1] == "--json":
    sys.meta_path.insert(0, Interrupt())
else:
    atexit.register(os.kill, os.getpid(), signal.SIGINT)
main()
"""


@pytest.mark.starts_processes
@pytest.mark.parametrize(
    ("words", "status", "said"), [(["--json"], 130, "ptbin: interrupted\n"), (["--version"], 0, "")]
)
def test_an_interrupt_before_and_after_the_command_is_no_traceback(
    words: list[str], status: int, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *words], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (status, said)
    if status:
        assert json.loads(done.stdout)["exit_status"] == status


@pytest.mark.starts_processes
@pytest.mark.parametrize(
    ("redirection", "status", "said"),
    [
        (">/dev/full", 1, "standard output cannot be written"),
        (">/dev/full 2>/dev/full", 1, ""),
        ("--json >/dev/full", 1, "standard output cannot be written"),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
    ],
)
def test_an_output_that_cannot_be_written_is_no_traceback(
    tmp_path: Path, redirection: str, status: int, said: str
) -> None:
    torch.save({"w\u20ac": torch.ones(2)}, tmp_path / "\u20ac.pt")
    command = f'"{sys.executable}" -m ptbin inspect \u20ac.pt {redirection}'
    latin = {**os.environ, "PYTHONIOENCODING": "latin-1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        ["sh", "-c", command], cwd=tmp_path, env=latin, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == status, done.stderr
    assert said in done.stderr
    assert len(done.stderr.splitlines()) <= 1


@pytest.mark.starts_processes
@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("inspect a.pt | :", 141),
        ("diff a.pt a.pt --json | :", 141),
        ("diff a.pt a.pt >/dev/full", 2),
        ("convert missing.pt b.bin --json | :", 141),
        ("convert --help | :", 141),
        ("convert missing.pt b.bin 2> >(:)", 2),
        ("inspect a.pt 2> >(:)", 0),
    ],
)
def test_an_output_that_is_read_no_more_has_one_status(tmp_path: Path, words: str, status: int) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    # A shell's own fork and pipe: the reader is gone, or will be, before Python has started.
    command = f'set -o pipefail; "{sys.executable}" -P -m ptbin {words}'
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr


@pytest.mark.starts_processes
def test_a_run_outlives_the_reader_of_its_log(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    words = [sys.executable, "-P", "-m", "ptbin", "convert", "a.pt", "out.bin", "--log-format", "json"]
    process = subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE)
    assert process.stderr is not None
    process.stderr.close()
    assert process.wait(60) == 0
    assert (tmp_path / "out.bin.manifest.json").exists()


@pytest.mark.starts_processes
def test_prefect_says_nothing_of_a_home_that_it_does_not_need(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from flows.prefect.orchestrator import import_prefect as i; i()"],
        env={**os.environ, "PREFECT_HOME": str(tmp_path / "file/home")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.starts_processes
def test_an_address_that_is_not_of_prefects_api_is_one_line(source: Path, tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), SimpleHTTPRequestHandler)  # answers 404
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/api"
    done = subprocess.run(
        [sys.executable, "-P", "-m", "ptbin", "convert", source, tmp_path / "out"],
        env={**os.environ, "PREFECT_API_URL": url, "PREFECT_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 2
    assert "is not Prefect's API, whose address ends in /api" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("words", [["inspect", "a.pt"], ["convert", "a.pt", "b.bin"], ["runs", "out"]])
def test_a_working_folder_that_is_gone_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert run_command(words) == 2
    assert "the working folder is gone" in capfd.readouterr().err
