"""What all of the suite shares: quiet, offline processes and freshly made checkpoints.

The factories themselves are in `tests.checkpoints`. Fixtures of one room live in that room's conftest.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import os
import signal
import tempfile
from collections import defaultdict
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

# Nothing that is imported or collected ever goes: it is not looked through for garbage, neither meanwhile nor
# later (`pytest_collection_finish`).
gc.disable()

# Before anything imports Prefect, transformers or torch: no calls home, no model hubs, and one thread per
# process, since the suite starts many of them on few cores.
os.environ.update(
    {
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "TRANSFORMERS_OFFLINE": "1",
    }
)
# Credentials and settings of the person who runs the suite are none of its business.
FOREIGN = ("AWS_", "HF_TOKEN", "MLFLOW_", "OTEL_", "PREFECT_", "PTBIN_")
KEPT = ("PREFECT_SERVER_ANALYTICS_ENABLED", "PTBIN_CORPUS", "PTBIN_LAW_EXAMPLES", "PTBIN_TEST_")
for _name in [name for name in os.environ if name.startswith(FOREIGN) and not name.startswith(KEPT)]:
    del os.environ[_name]
os.environ["AWS_EC2_METADATA_DISABLED"] = "true"
# A shell starts jobs in the background with SIGINT ignored, and so would be every process that a test starts:
# Prefect's worker, which sends itself SIGINT when SIGTERM comes, would never end.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The settings above come first.
from tests import starting, warm_python  # noqa: E402
from tests.checkpoints import FACTORIES, Checkpoint, Factory, MadeOnce  # noqa: E402


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[[str], Checkpoint]:
    """`make_checkpoint("tied")`: that factory's file, in a folder of the test's own."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    return lambda name: FACTORIES[name].make(folder)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> MadeOnce:
    """`made_once(factory)`: that factory's file, made once in this process, for tests that only read it."""
    root = tmp_path_factory.mktemp("made")

    @functools.cache
    def make(factory: Factory) -> Checkpoint:
        folder = root / factory.name
        folder.mkdir()
        return factory.make(folder)

    return make


SECONDS = {starting.SERVERS: 3.0, starting.PROCESSES: 3.0}
"""What a test with a marker takes, about; one without: 0.1 s."""
LONG = {
    "test_runners.py": 300.0,
    "test_operation.py": 220.0,
    "test_isolation.py": 200.0,
    "test_migrate_mlflow.py": 110.0,
    "test_newcomer.py": 75.0,
    "test_cli_process.py": 65.0,
    "test_interruptions.py": 60.0,
    "test_guide.py": 55.0,
    "test_lost_server.py": 50.0,
    "test_alerts.py": 40.0,
    "test_memory.py": 40.0,
}
"""What whole files take of which that says too little, beside others on two cores."""


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes folders unreadable, for root as well."""
    shut: list[str] = []
    real = os.scandir

    def scandir(path: Any = ".") -> Any:
        if str(path) in shut:
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)

    def close(folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        shut.append(str(folder))

    return close


def pytest_configure(config: pytest.Config) -> None:
    # Not that person's home of Prefect either, whatever a test starts and whatever ran before it.
    home = tempfile.TemporaryDirectory(prefix="ptbin-prefect-", ignore_cleanup_errors=True)
    os.environ["PREFECT_HOME"] = home.name
    config.add_cleanup(home.cleanup)
    if f"not {starting.PROCESSES}" in config.option.markexpr:
        starting.watch()
    if warm_python.VARIABLE not in os.environ:  # in a process of pytest-xdist it is
        with contextlib.ExitStack() as stack:
            stack.enter_context(warm_python.warm_python())
            config.add_cleanup(stack.pop_all().close)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: pytest-xdist gives whole files to its processes, in this order (see Makefile)."""
    seconds: defaultdict[Path, float] = defaultdict(float)
    for item in items:
        starting.mark(item)
        marked = [SECONDS[name] for name in SECONDS if item.get_closest_marker(name)]
        seconds[item.path] += max(marked, default=0.1)
    items.sort(key=lambda item: -LONG.get(item.path.name, seconds[item.path]))


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    with starting.only_where_marked(item):
        return (yield)
