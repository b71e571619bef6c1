"""The documentation's commands run as they stand, and every reason has an entry.

Each page's blocks run in order (`tests.pages`), in a folder with the files of `tests.documented`. Commands
on other people's stores and servers cannot be run here: of those each word is parsed.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
import subprocess
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import click
import pytest
import torch

import ptbin
from flows.cli.app import cli
from ptbin.options import ConvertOptions
from tests.documented import prepare_documented_files
from tests.pages import BLOCK, script_of
from tests.warm_python import stand_in, warm_path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCRIPTS = Path(sysconfig.get_path("scripts"))
PAGES = ("troubleshooting.md", "reasons.md", "listing.md", "cli.md")
"""Those whose blocks are run here."""
ROOMS = ("ptbin", "tasks", "flows")
RUN_REASONS = {"immutable", "max_delete", "unsafe_path", "worker_lost", "internal_error"}
"""Those that no class carries."""


@pytest.mark.starts_processes
@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_do_what_it_says(page: str, tmp_path: Path) -> None:
    if not (SCRIPTS / "ptbin").exists():
        pytest.skip("ptbin is not installed in this environment")
    folder = tmp_path / "folder"
    folder.mkdir()
    home = tmp_path / "home"
    home.mkdir()
    prepare_documented_files(folder)
    (folder / "weights").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    done = subprocess.run(
        ["bash", "-c", script_of((DOCS / page).read_text(encoding="utf-8"), f"{stand_in()} -P")],
        cwd=folder,
        env=kept | {"HOME": str(home), "PATH": f"{warm_path()}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_every_reason_has_an_entry() -> None:
    sources = [path.read_text(encoding="utf-8") for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    classes = {
        code for text in sources for code in re.findall(r'^ +reason(?:: .*)? = "(\w+)"', text, re.MULTILINE)
    }
    assert {"corrupt_archive", "run_stopped", "registry_error", "error"} <= classes
    issues = {code for text in sources for code in re.findall(r'Issue\([^)]*?"([a-z]+_[a-z_]+)"', text)}
    page = (DOCS / "reasons.md").read_text(encoding="utf-8")
    assert {code for code in classes | issues | RUN_REASONS if f"`{code}`" not in page} == set()


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_modules_that_the_design_names_are_there() -> None:
    named = set(re.findall(r"`([a-z_0-9/]+\.py)", (DOCS / "design.md").read_text(encoding="utf-8")))
    paths = [path.relative_to(ROOT).as_posix() for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    assert {name for name in named if not any(f"/{path}".endswith(f"/{name}") for path in paths)} == set()


RUN_ELSEWHERE = {"tutorial.md", "recipes.md", "diff.md", "migration.md"}
"""By tests/test_newcomer.py, interop/test_recipes.py, flows/test_diff_command.py, and below. The way back in
`migration.md` is run by tests/ptbin/registries/test_mlflow_registry.py."""
PARSED_ONLY = {"provenance.md"}
"""`pip install`, a key and a signature: tests/flows/test_migrate_flow.py makes the same calls."""


def test_every_page_with_blocks_has_a_test_that_runs_them() -> None:
    pages = {path.name for path in DOCS.glob("*.md") if BLOCK.search(path.read_text(encoding="utf-8"))}
    assert pages == {*PAGES, *RUN_ELSEWHERE, *PARSED_ONLY}


CODE = re.compile(r"^ *```sh\n(.*?)^ *```|^((?: {4,}[^\n]*\n)+)", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ *(?:\$ )?(?:\S+=\S+ )*(ptbin [a-z].*)$", re.MULTILINE)


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "deployments" / "README.md", *sorted(DOCS.glob("*.md"))],
    ids=lambda page: f"{page.parent.name}-{page.stem}",
)
def test_documented_commands_are_calls_that_exist(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("minio.json").write_text("{}")
    blocks = CODE.findall(page.read_text(encoding="utf-8").replace("\\\n", " "))
    text = "\n".join(fenced or indented for fenced, indented in blocks)
    for line in COMMAND.findall(text):
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|>&;")
        lexer.whitespace_split = True
        words = []
        for word in lexer:
            if word[0] in "|>&;":
                break
            words.append(word)
        _parse(words[1:])


def _parse(words: list[str]) -> None:
    """Raises click's error for a command, an option or a value that there is not."""
    with cli.make_context("ptbin", list(words)) as context:
        rest = [*context._protected_args, *context.args]
        if rest:
            name, command, arguments = cli.resolve_command(context, rest)
            assert command is not None
            command.make_context(name, arguments, parent=context)


DOCUMENTED = re.findall(r"^::: (ptbin\.\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("name", [name for name in DOCUMENTED if name != "ptbin.errors"])
def test_documented_arguments_are_the_functions_own(name: str) -> None:
    """`make docs` stops at one that is not."""
    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(module), attribute)
    _, _, arguments = (inspect.getdoc(documented) or "").partition("Args:\n")
    named = re.findall(r"^ {4}(\S[^:\n]*): ", arguments.partition("\n\n")[0], re.MULTILINE)
    assert set(named) <= inspect.signature(documented).parameters.keys()


def test_consumers_of_a_migrated_registry_load_as_the_page_says(tmp_path: Path) -> None:
    page = (DOCS / "migration.md").read_text(encoding="utf-8")
    (code,) = [code for _, language, code in BLOCK.findall(page) if language == "python"]
    net, trained = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    ptbin.convert(tmp_path / "a.pt", tmp_path / "data" / "model.bin")
    mlflow = SimpleNamespace(artifacts=SimpleNamespace(download_artifacts=lambda _: str(tmp_path)))
    exec(code, {"mlflow": mlflow, "torch": torch, "net": net})  # noqa: S102 - our own page
    assert torch.equal(net.weight, trained.weight)


def test_a_documented_recipe_is_one() -> None:
    (text,) = re.findall(r"```json\n(.*?)```", (DOCS / "parts.md").read_text(encoding="utf-8"), re.DOTALL)
    assert ConvertOptions(recipe=text).recipe


def test_a_command_that_there_is_not_would_be_found() -> None:
    for words in (
        ["convert", "a", "b", "--no-such-option"],
        ["convert", "a", "b", "--format", "onnx"],
        ["no"],
    ):
        with pytest.raises(click.UsageError):
            _parse(words)
