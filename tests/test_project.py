"""What the project promises as a whole: what is installed, what imports cost, what the tree must not hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import ptbin

ROOT = Path(__file__).parent.parent
PACKAGES = ("ptbin", "tasks", "flows")

installed_run = pytest.mark.skipif(
    not os.environ.get("PYTHONSAFEPATH"), reason="run without -P: the working directory is what is tested"
)


def _python(code: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.starts_processes
@installed_run
@pytest.mark.parametrize("package", PACKAGES)
def test_the_suite_tests_what_is_installed(package: str) -> None:
    where = Path(_python(f"import {package}; print({package}.__path__[0])")).resolve()
    assert ROOT not in where.parents or ".venv" in where.parts


@pytest.mark.starts_processes
@installed_run
def test_installed_files_are_those_of_the_tree() -> None:
    """A stale installation would make every other test a statement about the past."""
    for package in PACKAGES:
        installed = Path(_python(f"import {package}; print({package}.__path__[0])"))
        tree = {
            path.relative_to(ROOT / package): path.read_bytes() for path in (ROOT / package).rglob("*.py")
        }
        there = {path.relative_to(installed): path.read_bytes() for path in installed.rglob("*.py")}
        if package == "flows":  # `ptbin deployments` writes these out; they are no modules of ours
            there = {path: text for path, text in there.items() if path.parts[0] != "deployments"}
        differing = [str(name) for name in tree.keys() | there.keys() if tree.get(name) != there.get(name)]
        assert sorted(differing) == [], "run `make install`"


def test_version_is_said_once_and_truly() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" in project["dynamic"]
    if os.environ.get("PYTHONSAFEPATH"):
        assert metadata.version("ptbin") == ptbin.__version__


def test_version_is_that_of_the_changelogs_first_heading() -> None:
    heading = re.search(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None
    assert heading[1] == ptbin.__version__
    assert re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", heading[2])


def test_every_page_is_in_the_sites_navigation() -> None:
    named = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert named == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_hooks_and_workflow_run_what_make_runs() -> None:
    yaml = pytest.importorskip("yaml")
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    makefile = (ROOT / "Makefile").read_text()
    tools = {hook["entry"].split()[0].removeprefix(".venv/") for hook in hooks}
    assert tools == {"bin/ruff", "bin/mypy", "bin/lint-imports"}
    assert all(tool.replace("bin/", "$(BIN)/") in makefile for tool in tools)
    steps = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]["test"]["steps"]
    commands = {step["run"].removeprefix("make ") for step in steps if "run" in step}
    assert commands == {"check", "test", "docs"}
    assert all(re.search(rf"^{command}:", makefile, re.MULTILINE) for command in commands)


@pytest.mark.starts_processes
def test_importing_ptbin_imports_nothing_heavy() -> None:
    loaded = _python(
        "import ptbin, sys; ptbin.convert, ptbin.inspect, ptbin.verify; print(*sys.modules)"
    ).split()
    heavy = {"torch", "numpy", "prefect", "fsspec", "s3fs", "boto3", "botocore", "rich", "pydantic"}
    assert heavy & {name.partition(".")[0] for name in loaded} == set()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("hatchling", reason="the wheel's builder is in the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run([*command, str(ROOT)], check=True, timeout=120, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.mark.starts_processes
def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == set(PACKAGES)
    assert not [name for name in names if name.endswith((".pyc", ".bin", ".pt", "/.env"))]
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)


@pytest.mark.starts_processes
def test_wheel_offers_the_command(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "ptbin = ptbin.__main__:main" in archive.read(entries).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())


def _tracked_texts() -> dict[str, str]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, cwd=ROOT, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    texts = {}
    for name in listed.decode().split("\0"):
        if name and (ROOT / name).is_file():
            texts[name] = (ROOT / name).read_bytes().decode("utf-8", errors="replace")
    return texts


@pytest.mark.starts_processes
def test_no_secrets_and_no_places_of_one_machine_in_the_tree() -> None:
    patterns = {
        "an AWS access key": r"\b(AKIA|ASIA)[0-9A-Z]{16}\b",
        "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
        "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
        "a GitHub token": r"\bgh[pousr]_[A-Za-z0-9]{30,}\b",
        "a home folder": r"/(home|Users)/(?!me\b|user\b|runner\b)[a-z]\w+/",
        "a package index": r"(?i)(index-url|find-links)\s*=?\s*(https?|file):",
    }
    found = [
        f"{name}: {what}"
        for name, text in _tracked_texts().items()
        if name != "tests/test_project.py"
        for what, pattern in patterns.items()
        if re.search(pattern, text)
    ]
    assert found == []


def test_constraints_pin_everything_and_point_nowhere() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)] == []
    pinned = {re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in lines}
    assert not [name for name in pinned if name.startswith(("nvidia", "cuda", "triton"))]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    names = {re.sub(r"[-_.]+", "-", re.split(r"[^\w.-]", one)[0]).lower() for one in wanted}
    assert names - pinned == set()


def test_license_is_the_whole_apache_text() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
