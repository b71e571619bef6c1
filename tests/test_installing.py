"""What an installation needs, and what it says where something is missing or in the way."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import ptbin
from tests.checkpoints import FACTORIES

ROOT = Path(__file__).parent.parent
SITE = Path(sysconfig.get_path("purelib"))
SMALL = ("click", "fsspec", "ml_dtypes", "numpy", "numpy.libs", "ptbin", "tasks", "flows")
"""Enough for everything that needs neither torch nor Prefect."""

pytestmark = [
    pytest.mark.starts_processes,
    pytest.mark.skipif(not (SITE / "ptbin").is_dir(), reason="ptbin is not installed in this environment"),
]


@pytest.fixture(scope="module")
def small_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds ptbin, numpy, fsspec and click, and nothing else."""
    folder = tmp_path_factory.mktemp("small") / "env"
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    for name in SMALL:
        if (SITE / name).exists():
            (site / name).symlink_to(SITE / name)
    return folder / "bin" / "python"


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    made = FACTORIES["lightning_like"].make(tmp_path)
    (tmp_path / "store").mkdir()
    shutil.copy(made.path, tmp_path / "store" / "a.ckpt")
    shutil.move(made.path, tmp_path / "last.ckpt")
    ptbin.convert(str(tmp_path / "last.ckpt"), str(tmp_path / "last.bin"))
    return tmp_path


def _run(python: Path, words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PREFECT"))}
    return subprocess.run(
        [str(python), "-P", "-m", "ptbin", *words.split()],
        cwd=cwd,
        env=kept | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_one_checkpoint_needs_neither_torch_nor_prefect(small_python: Path, workplace: Path) -> None:
    for words in (
        "inspect last.ckpt",
        "convert last.ckpt last.bin --force",
        "verify last.bin",
        "verify last.bin.manifest.json",
        "diff last.ckpt last.bin",
        "convert last.ckpt model.safetensors --format safetensors --dtype bfloat16",
        "restore last.bin last.pt",
        "convert store out/ --dry-run",
    ):
        done = _run(small_python, words, workplace)
        assert done.returncode == 0, f"{words}: {done.stderr}"
    code = "import ptbin; w = ptbin.load('last.bin'); assert all(w[n].size for n in w); w.close()"
    subprocess.run([str(small_python), "-P", "-c", code], cwd=workplace, check=True, timeout=60)


@pytest.mark.parametrize(
    ("words", "package"),
    [
        ("convert store out", "prefect"),
        ("sync store out", "prefect"),
        ("verify .", "prefect"),
        ("convert last.ckpt out.bin --verify load", "torch"),
        ("restore last.bin out.pt --model nets:make", "torch"),
        ("verify last.bin --level load", "torch"),
        ("convert s3://bucket/a.pt out.bin", "s3fs"),
    ],
)
def test_what_needs_a_missing_package_says_so_and_writes_nothing(
    small_python: Path, workplace: Path, words: str, package: str
) -> None:
    before = sorted(workplace.rglob("*"))
    done = _run(small_python, words, workplace)
    assert done.returncode == 2, done.stderr
    assert f"needs {package}, which is not installed here" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert sorted(workplace.rglob("*")) == before


def test_a_terminal_without_rich_gets_plain_lines(small_python: Path, workplace: Path) -> None:
    ours, theirs = pty.openpty()
    command = [str(small_python), "-P", "-m", "ptbin", "convert", "last.ckpt", "b.bin"]
    done = subprocess.run(
        command,
        cwd=workplace,
        env=os.environ | {"TERM": "xterm"},
        stdout=subprocess.PIPE,
        stderr=theirs,
        timeout=60,
    )
    os.close(theirs)
    os.close(ours)
    assert done.returncode == 0
    assert b"9 tensors" in done.stdout


@pytest.mark.parametrize("taken", ["flows/__init__.py", "tasks.py"])
def test_another_projects_modules_of_our_names_are_explained(workplace: Path, taken: str) -> None:
    file = workplace / "project" / taken
    file.parent.mkdir(parents=True)
    file.touch()
    done = _run(Path(sys.executable), "inspect last.ckpt", workplace, PYTHONPATH=str(workplace / "project"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("ptbin: error: Python finds another module ")
    assert str(file) in line


def test_deployments_are_written_out_and_edits_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "deployments"
    assert _run(Path(sys.executable), "deployments", tmp_path).returncode == 0
    written = {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    tracked = subprocess.run(["git", "ls-files", "deployments"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode == 0:
        wanted = {name.removeprefix("deployments/") for name in tracked.stdout.split()}
        assert {str(name) for name in written} == wanted | {"constraints.txt"}
    assert all(
        text == (ROOT / "deployments" / name).read_bytes()
        for name, text in written.items()
        if str(name) != "constraints.txt"
    )
    assert written[Path("constraints.txt")] == (ROOT / "constraints.txt").read_bytes()

    (folder / "prefect.yaml").write_text("name: mine\n")
    again = _run(Path(sys.executable), "deployments", tmp_path)
    assert again.returncode == 2
    assert "prefect.yaml differs" in again.stderr
    assert (folder / "prefect.yaml").read_text() == "name: mine\n"
    assert _run(Path(sys.executable), "deployments --force", tmp_path).returncode == 0
    assert (folder / "prefect.yaml").read_bytes() == written[Path("prefect.yaml")]
