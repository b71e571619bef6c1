"""Embedded servers over one home: several that start together, and a database that is broken."""

from __future__ import annotations

import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from flows.prefect.child import OrchestratorError, embedded_server
from tests.warm_python import stand_in

pytestmark = pytest.mark.starts_servers


@pytest.fixture(autouse=True)
def warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", stand_in())


def test_several_on_a_new_home_all_start(tmp_path: Path) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(3) as pool:
        starts = [embedded_server({"PREFECT_HOME": str(tmp_path)}) for _ in range(3)]
        urls = list(pool.map(stack.enter_context, starts))
        assert len(set(urls)) == 3
        for url in urls:
            with urllib.request.urlopen(f"{url}/health") as answer:  # noqa: S310 - our own
                assert answer.status == 200


def test_a_broken_database_gives_its_reason_and_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "prefect.db").write_bytes(b"no database at all. " * 999)
    with pytest.raises(OrchestratorError) as caught, embedded_server({"PREFECT_HOME": str(tmp_path)}):
        pass
    said = str(caught.value)
    assert "file is not a database" in said
    assert f"{tmp_path}/prefect.db: move it away" in said
    assert "\n" not in said
