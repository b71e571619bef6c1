"""Nothing runs but what `--model` names: files that Python would take for modules lie everywhere.

Each of them leaves a mark when it is run. The command is the installed `ptbin`, as a user starts it, in a
folder full of them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ptbin
from flows.prefect.child import embedded_server
from tests.bits import assert_same_tensors
from tests.servers.prefect_home import prefect_template
from tests.warm_python import stand_in

pytestmark = pytest.mark.starts_processes

PTBIN = Path(sysconfig.get_path("scripts")) / "ptbin"
BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"
STATE_DICT = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.ones(2)}

MODULES = (
    *("torch", "numpy", "inspect", "socket", "runpy", "json", "sympy", "onnx", "ptbin", "flows", "prefect"),
    *("sitecustomize", "usercustomize", "transformers", "safetensors", "tqdm", "dill", "requests"),
)
NETS = """
import random
import layers
from torch import nn

def linear():
    return layers.Linear(3, 2)

def inputs():
    import torch
    return (torch.ones(1, 3),)
"""
LAYERS = """
from torch import nn

class Linear(nn.Linear):
    pass
"""


class Trap:
    """A folder where `marks` gets a file for each trap that was run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "trap"
        self.marks = folder / "marks"
        self.marks.mkdir()
        self.plant(self.folder)

    def plant(self, folder: Path, modules: tuple[str, ...] = MODULES) -> None:
        """Modules, a .pth file, and a start-up script."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*modules, "startup"):
            (folder / f"{name}.py").write_text(self._spring(name))
        (folder / "trap.pth").write_text(f"import os; {self._spring('pth')}\n")

    def _spring(self, name: str) -> str:
        return f"open({str(self.marks / name)!r}, 'w').close()"

    def run(
        self, *words: str | Path, python_path: str = "", temporary: Path | None = None, **more: str
    ) -> str:
        """Run a command in the folder of traps; its standard error."""
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PREFECT"))},
            "PYTHONSTARTUP": str(self.folder / "startup.py"),
            "PYTHONUSERBASE": str(self.folder),
            "TMPDIR": str(temporary or self.folder),
            "PREFECT_HOME": str(self.folder / "prefect-home"),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
            **more,
        }
        if python_path:
            environment["PYTHONPATH"] = python_path
        done = subprocess.run(
            list(map(str, words)),
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stderr

    def sprung(self) -> list[str]:
        return sorted(path.name for path in self.marks.iterdir())


@pytest.fixture
def trap(tmp_path: Path) -> Trap:
    trap = Trap(tmp_path)
    torch.save(STATE_DICT, trap.folder / "last.pt")
    ptbin.convert(str(trap.folder / "last.pt"), str(trap.folder / "last.bin"))
    return trap


def test_the_traps_work(trap: Trap) -> None:
    trap.run(sys.executable, "-c", "import torch, sympy")
    assert {"torch", "sympy"} <= set(trap.sprung())


def test_a_state_dict(trap: Trap, tmp_path: Path) -> None:
    only_torch = tmp_path / "path"
    trap.plant(only_torch, ("torch",))
    trap.run(PTBIN, "restore", "last.bin", "out.pt", python_path=str(only_torch))
    assert trap.sprung() == []
    assert_same_tensors(torch.load(trap.folder / "out.pt", weights_only=True), STATE_DICT)


# What a form imports late is looked for in every place; the others, which import less, in the worst one.
@pytest.mark.parametrize(
    ("place", "form"),
    [("here", form) for form in ("module", "torchscript", "exported", "state-dict")]
    + [("model-path", "exported"), ("python-path", "exported")],
)
def test_a_model(form: str, place: str, trap: Trap, tmp_path: Path) -> None:
    """Its folder has traps as well. Its own modules are found; nobody else looks there."""
    source = trap.folder if place == "here" else tmp_path / "src"
    trap.plant(source)
    (source / "nets.py").write_text(NETS)
    (source / "layers.py").write_text(LAYERS)
    options = ["--model", "nets:linear", "--as", form]
    if form in {"torchscript", "exported"}:
        options += ["--example", "nets:inputs"]
    if place == "model-path":
        options += ["--model-path", str(source)]
    path = ""
    if place == "python-path":
        # The command itself reads PYTHONPATH, as any Python: no traps that it would meet before a child does.
        path = str(tmp_path / "apart")
        trap.plant(Path(path), ("torch", "sympy", "onnx"))
        (Path(path) / "nets.py").write_text(NETS)
        (Path(path) / "layers.py").write_text(LAYERS)
    out = "out.pt2" if form == "exported" else "out.pt"
    trap.run(PTBIN, "restore", "last.bin", out, *options, python_path=path)
    assert trap.sprung() == []
    assert (trap.folder / out).exists()


def test_a_module_of_the_standard_library_is_not_taken_from_the_models_folder(
    trap: Trap, tmp_path: Path
) -> None:
    source = tmp_path / "src"
    trap.plant(source, ("cProfile", "wave"))
    (source / "nets.py").write_text(
        "import cProfile, wave\nfrom torch import nn\ndef linear(): return nn.Linear(3, 2)"
    )
    trap.run(PTBIN, "restore", "last.bin", "out.pt", "--model", "nets:linear", "--model-path", str(source))
    assert trap.sprung() == []


def test_proof_by_loading(trap: Trap) -> None:
    trap.run(PTBIN, "convert", "last.pt", "loaded.bin", "--verify", "load")
    trap.run(PTBIN, "verify", "loaded.bin", "--level", "load")
    assert trap.sprung() == []


@pytest.fixture(scope="module")
def api_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of Prefect that starts apart from the traps."""
    home = tmp_path_factory.mktemp("home")
    shutil.copyfile(prefect_template(tmp_path_factory), home / "prefect.db")
    with contextlib.ExitStack() as running:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", stand_in())
            url = running.enter_context(embedded_server({"PREFECT_HOME": str(home)}))
        yield url


@pytest.mark.parametrize("runner", ["processes", "dask", "ray"])
def test_the_workers_of_a_flow(runner: str, trap: Trap, request: pytest.FixtureRequest) -> None:
    (trap.folder / "weights").mkdir()
    # With processes the run's own server, and its migrations, run among the traps as well.
    more = {} if runner == "processes" else {"PREFECT_API_URL": request.getfixturevalue("api_url")}
    for number in range(2):
        torch.save(STATE_DICT, trap.folder / "weights" / f"{number}.pt")
    words = ["convert", "weights", "out", "--runner", runner, "--workers", "1", "--verify", "load"]
    with tempfile.TemporaryDirectory(prefix="t") as short:  # Ray's sockets lie there, in names of 107 bytes
        trap.plant(Path(short))
        trap.run(PTBIN, *words, temporary=Path(short), **more)
    assert trap.sprung() == []
    assert len(list((trap.folder / "out").glob("*.bin"))) == 2


def test_the_helpers_of_the_benchmarks(trap: Trap) -> None:
    script = f"""
        import sys
        sys.path.append({str(BENCHMARKS)!r})
        from pathlib import Path
        import run
        work = Path("work"); work.mkdir()
        run.small_file(work, 1)
    """
    trap.run(sys.executable, "-P", "-c", textwrap.dedent(script))
    assert trap.sprung() == []


def test_every_python_that_the_project_starts_is_isolated() -> None:
    """By the words of each call: a child that is added later is seen here."""
    root = BENCHMARKS.parent
    careless = []
    for folder in ("ptbin", "tasks", "flows", "benchmarks", "docs"):
        for path in sorted((root / folder).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for number, line in enumerate(lines, 1):
                words = " ".join(lines[number - 1 : number + 2])
                starts = "[sys.executable" in line or "[PYTHON" in line or line.strip() == "sys.executable,"
                if starts and '"-I"' not in words and '"-P"' not in words and "SCRIPTS" not in words:
                    careless.append(f"{path.relative_to(root)}:{number}")
    assert careless == []
