"""A newcomer: an empty HOME, no Prefect settings, the wheel in a new environment, the pages' commands.

README's way to install is taken word by word from a copy of the checkout, then README's quick start and all
of the tutorial. Two things differ from a fresh machine: the packages that ptbin needs are linked from this
environment and not fetched, though pip resolves them; and the wheel's builder is the one at hand.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

import pytest

import ptbin
from tests.checkpoints import FACTORIES
from tests.pages import script_of

ROOT = Path(__file__).parent.parent
SITE = Path(sysconfig.get_path("purelib"))
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHECKOUT = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt")
ROOMS = ("ptbin", "tasks", "flows", "deployments")

pytestmark = [
    pytest.mark.starts_processes,
    pytest.mark.starts_servers,
    pytest.mark.skipif(not (SITE / "ptbin").is_dir(), reason="ptbin is not installed in this environment"),
]


class Newcomer:
    """A person at a shell."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.place = folder / "work"
        self.checkout = folder / "checkout"
        self.bin = folder / "env" / "bin"
        for made in (self.home, self.place, self.checkout):
            made.mkdir()
        for name in ROOMS:
            shutil.copytree(
                ROOT / name, self.checkout / name, ignore=shutil.ignore_patterns("__pycache__", ".env")
            )
        for name in CHECKOUT:
            shutil.copy(ROOT / name, self.checkout)
        self._create_environment(folder)

    def _create_environment(self, folder: Path) -> None:
        venv.create(folder / "env", symlinks=True, with_pip=True)
        needed = folder / "needed"
        needed.mkdir()
        for found in SITE.iterdir():
            if not re.match(r"(ptbin|tasks|flows|pip)\b", found.name):
                (needed / found.name).symlink_to(found)
        (site,) = (folder / "env").glob("lib/python*/site-packages")
        for old in (*site.glob("setuptools*"), *site.glob("pkg_resources")):
            shutil.rmtree(old)  # of Python's own bundle, which pip would replace on a fresh machine
        (site / "needed.pth").write_text(f"{needed}\n")

    def run(self, script: str, cwd: Path | None = None) -> str:
        """What it printed. Nothing of this process's settings is known to it."""
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=cwd or self.place,
            env={
                "HOME": str(self.home),
                "PATH": f"{self.bin}{os.pathsep}/usr/bin{os.pathsep}/bin",
                "LANG": "C.UTF-8",
                "PIP_NO_INDEX": "1",
                "PIP_NO_BUILD_ISOLATION": "0",  # "0" is pip's way to say that there is none
            },
            capture_output=True,
            text=True,
            timeout=280,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory: pytest.TempPathFactory) -> Newcomer:
    """One that has installed ptbin as README says."""
    person = Newcomer(tmp_path_factory.mktemp("newcomer"))
    for start in ("python3 -m pip wheel ", "pip install -c "):
        (line,) = re.findall(rf"^    ({re.escape(start)}.*?)(?:  +#.*)?$", README, re.MULTILINE)
        person.run(line, person.checkout)
    return person


def test_the_command_is_there_and_it_is_the_wheels(newcomer: Newcomer) -> None:
    where = newcomer.run(
        "which ptbin; python -P -c 'import flows, ptbin; print(ptbin.__file__, flows.__file__)'"
    )
    assert where.count(str(newcomer.bin.parent)) == 3
    assert f"ptbin {ptbin.__version__}" in newcomer.run("ptbin --version")


def test_the_tutorial_from_its_first_command_to_its_last(newcomer: Newcomer) -> None:
    folder = newcomer.place / "tutorial"
    folder.mkdir()
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    newcomer.run(script_of(text, python="python3 -P"), folder)
    assert (newcomer.home / ".prefect").is_dir()


def test_readmes_quick_start(newcomer: Newcomer) -> None:
    folder = newcomer.place / "readme"
    made = FACTORIES["lightning_like"].make(newcomer.home)
    for name in ("run1/last.ckpt", "checkpoints/a/last.ckpt"):
        (folder / name).parent.mkdir(parents=True)
        shutil.copy(made.path, folder / name)
    (folder / "weights").mkdir()
    quick_start = README.partition("## Quick start")[2].partition("No weight is lost")[0]
    (alone,) = re.findall(r"```sh\n(.*?)```", quick_start, re.DOTALL)
    store = re.findall(r"^    (ptbin .*)$", quick_start, re.MULTILINE)
    assert len(store) == 3
    newcomer.run(f"set -e\n{alone}", folder)
    newcomer.run("set -e\n" + "\n".join(store), folder)
    assert (folder / "weights/a/last.bin.manifest.json").is_file()
