"""A store of two models to mirror, and the mirror of it."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from flows.prefect.orchestrator import Orchestrator
from flows.sync import sync
from ptbin.runs.run_ids import new_run_id
from ptbin.stores import Store, open_store
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint

__all__ = ["COMPANIONS", "ON_BOTH", "OUTPUTS", "Capture", "Mirror", "mirror", "ptbin"]


Capture = pytest.CaptureFixture[str]


@pytest.fixture
def ptbin(
    ptbin: Callable[..., subprocess.CompletedProcess[str]], server: Orchestrator
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The command line on the session's server: one of its own would cost each call ten seconds."""
    return functools.partial(ptbin, PREFECT_API_URL=server.api_url)


@dataclass
class Mirror:
    """SOURCE with two models and their companions, DEST empty, a place for backups."""

    root: str
    options: dict[str, Any]
    blank: bytes
    summary: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.put("bert/step1.pt", self.blank)
        self.put("bert/config.json", b'{"layers": 2}')
        self.put("bert/tokenizer.model", b"sentence pieces")
        self.put("gpt/last.ckpt", self.blank)
        self.put("gpt/README.md", b"# gpt")
        self.put("gpt/figures/loss.png", b"png")

    def place(self, name: str) -> tuple[Store, str]:
        return open_store(f"{self.root}/{name}", self.options)

    def put(self, path: str, data: bytes, name: str = "source") -> None:
        store, folder = self.place(name)
        store.write_bytes(f"{folder}/{path}", data)

    def drop(self, path: str) -> None:
        store, folder = self.place("source")
        store.delete(f"{folder}/{path}")

    def files(self, name: str = "dest") -> set[str]:
        store, folder = self.place(name)
        return {item.path for item in store.iter_objects(folder) if not item.path.startswith("_ptbin/")}

    def read(self, path: str, name: str = "dest") -> bytes:
        store, folder = self.place(name)
        return store.read_bytes(f"{folder}/{path}")

    def forget(self) -> None:
        """Lose the index of finished work."""
        store, folder = self.place("dest")
        for item in list(store.iter_objects(f"{folder}/_ptbin/index")):
            store.delete(f"{folder}/_ptbin/index/{item.path}")

    def sync(self, source: str = "source", **parameters: Any) -> dict[str, Any]:
        """The summary's counts that are not zero."""
        with open_live_run(LiveRun(new_run_id(), self.options, self.options)) as live:
            state = sync(
                f"{self.root}/{source}",
                f"{self.root}/dest",
                run_id=live.run_id,
                return_state=True,
                **parameters,
            )
        if "message" not in live.summary:
            error = state.result(raise_on_failure=False)
            assert isinstance(error, Exception)
            raise error
        self.summary = live.summary
        names = "converted copied up_to_date rejected failed deleted backed_up kept".split()
        assert live.summary["succeeded"] == state.is_completed()
        return {name: live.summary[name] for name in names if live.summary[name]}

    def reasons(self) -> list[str]:
        return sorted(problem["reason"] for problem in self.summary["problems"])


ON_BOTH = pytest.mark.parametrize("mirror", ["files", "s3"], indirect=True)


@pytest.fixture
def mirror(request: pytest.FixtureRequest, tmp_path: Path, _blank: bytes) -> Mirror:
    if getattr(request, "param", "files") == "files":
        return Mirror(str(tmp_path), {}, _blank)
    endpoint: S3Endpoint = request.getfixturevalue("moto_s3")
    return Mirror(f"s3://{endpoint.make_bucket()}/m", endpoint.storage_options, _blank)


OUTPUTS = {"bert/step1.bin", "bert/step1.bin.manifest.json", "gpt/last.bin", "gpt/last.bin.manifest.json"}
COMPANIONS = {"bert/config.json", "bert/tokenizer.model", "gpt/README.md"}
