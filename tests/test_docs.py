"""The documentation's commands run as they stand, and every reason has an entry.

Each page's blocks run in order, in one shell, in a folder with the files of `tests.documented`. A block below
`<!-- exits 1 -->` must exit with 1, any other one with 0.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.documented import prepare_documented_files
from tests.servers.prefect_home import prefect_template

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
SCRIPTS = Path(sysconfig.get_path("scripts"))
BLOCK = re.compile(r"^(?:<!-- exits (\d+) -->\n)?```(sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = ("troubleshooting.md", "reasons.md", "tutorial.md")
ROOMS = ("ptbin", "tasks", "flows")
RUN_REASONS = {"immutable", "max_delete", "unsafe_path", "worker_lost", "internal_error"}
"""Those that no class carries."""


def _script(text: str) -> str:
    lines = []
    for number, (status, language, code) in enumerate(BLOCK.findall(text), 1):
        command = f"set -e\n{code}" if language == "sh" else f"{sys.executable} -P - <<'PYTHON'\n{code}PYTHON"
        lines.append(f"(\n{command}\n)\nstatus=$?")
        lines.append(
            f'[ $status = {status or 0} ] || {{ echo "block {number} exited with $status"; exit 1; }}'
        )
    return "\n".join(lines)


@pytest.mark.starts_servers
@pytest.mark.parametrize("page", PAGES)
def test_a_pages_commands_do_what_it_says(
    page: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not (SCRIPTS / "ptbin").exists():
        pytest.skip("ptbin is not installed in this environment")
    folder = tmp_path / "folder"
    folder.mkdir()
    home = tmp_path / "home"
    (home / ".prefect").mkdir(parents=True)
    if page == "tutorial.md":  # it starts Prefect's server, as a newcomer without any settings does
        shutil.copy(prefect_template(tmp_path_factory), home / ".prefect" / "prefect.db")
    else:
        prepare_documented_files(folder)
        (folder / "weights").mkdir()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT")}
    done = subprocess.run(
        ["bash", "-c", _script((DOCS / page).read_text(encoding="utf-8"))],
        cwd=folder,
        env=kept | {"HOME": str(home), "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=240,
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
