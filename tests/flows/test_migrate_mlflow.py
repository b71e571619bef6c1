"""Migrations out of and into real MLflow servers, artifacts local and on S3; killed ones; what users find."""

from __future__ import annotations

import importlib.util
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from flows.prefect.orchestrator import Orchestrator
from ptbin.stores import open_store
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3
from tests.servers.mlflow_server import MlflowServer, copy_empty, run_mlflow

__all__ = ["moto_s3"]

Run = Callable[..., subprocess.CompletedProcess[str]]

GOOD = {
    "classifier": {"champion", "challenger"},
    "local": {"champion"},
    "folders": {"plain", "lightning"},
}


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database to copy: migrated and empty. `filled` puts it there."""
    return tmp_path_factory.mktemp("empty") / "mlflow.db"


@pytest.fixture(scope="module")
def filled(
    tmp_path_factory: pytest.TempPathFactory, empty: Path
) -> Iterator[tuple[MlflowServer, dict[str, Any], Path]]:
    """A server with three models: its artifacts go by way of itself; what each alias answers."""
    folder = tmp_path_factory.mktemp("source")
    with run_mlflow(folder) as server:
        copy_empty(folder / "mlflow.db", empty)
        marker = folder / "was-run"
        said = server.run("fill", str(marker))
        yield server, said, marker


@pytest.fixture
def migrate(ptbin: Run, server: Orchestrator) -> Callable[..., tuple[int, dict[str, Any], str]]:
    """Run `ptbin migrate` on the session's Prefect server: status, the JSON document, standard error."""

    def run(*words: str, **more: Any) -> tuple[int, dict[str, Any], str]:
        done = ptbin("migrate", *words, "--json", PREFECT_API_URL=server.api_url, **more)
        try:
            return done.returncode, json.loads(done.stdout), done.stderr
        except ValueError:
            return done.returncode, {}, done.stderr

    return run


def s3_environment(endpoint: S3Endpoint) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": endpoint.key,
        "AWS_SECRET_ACCESS_KEY": endpoint.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "MLFLOW_S3_ENDPOINT_URL": endpoint.url,
    }


def without_run(state: dict[str, Any]) -> dict[str, Any]:
    """A registry's state without what differs from run to run: its id, and the times in manifests."""
    copy: dict[str, Any] = json.loads(json.dumps(state))
    for name, model in copy.items():
        if name == "_logged":
            continue
        for version in model["versions"].values():
            version["tags"].pop("ptbin.run", None)
            for path in list(version["files"]):
                if path.endswith(".manifest.json"):
                    version["files"][path] = "present"
    return copy


def test_one_server_into_another(
    filled: tuple[MlflowServer, dict[str, Any], Path],
    migrate: Any,
    empty: Path,
    tmp_path: Path,
    moto_s3: S3Endpoint,
) -> None:
    source, said, marker = filled
    bucket = moto_s3.make_bucket()
    artifacts = ("--default-artifact-root", f"s3://{bucket}/artifacts", "--no-serve-artifacts")
    with run_mlflow(tmp_path / "dest", artifacts, s3_environment(moto_s3), database=empty) as dest:
        options = json.dumps(moto_s3.storage_options)
        words = (source.uri, dest.uri, "--dest-options", options)

        status, plan, _ = migrate(*words, "--dry-run")
        assert status == 1
        kept = {(row["model"], row["version"]): row["dest_version"] for row in plan["versions"]}
        assert kept == {
            ("classifier", "2"): "2",
            ("classifier", "3"): None,
            ("classifier", "4"): None,
            ("classifier", "5"): "5",
            ("folders", "1"): "1",
            ("folders", "2"): "2",
            ("local", "1"): "1",
        }
        assert any("histories of metrics" in text for text in plan["not_kept"])
        assert dest.run("state") == {"_logged": []}, "a dry run writes nothing"

        status, summary, log = migrate(*words, "--provenance")
        assert status == 1, log
        assert "not kept: histories of metrics" in log
        assert (summary["migrated"], summary["rejected"], summary["failed"]) == (5, 2, 0)
        reasons = {problem["source"].rpartition("/")[2]: problem["reason"] for problem in summary["problems"]}
        assert reasons == {"3": "unsafe_pickle", "4": "corrupt_archive"}
        assert not marker.exists(), "no pickle ran"

        # Somebody who knows only MLflow finds every good version and nothing else.
        assert dest.run("use") == said
        before, after = source.run("state"), dest.run("state")
        assert set(after["classifier"]["versions"]) == {"2", "5"}, "numbers are kept, gaps too"
        for name in GOOD:
            assert after[name]["description"] == before[name]["description"]
            assert after[name]["tags"] == before[name]["tags"]
            for number, version in after[name]["versions"].items():
                old = before[name]["versions"][number]
                assert old["tags"].items() <= version["tags"].items()
                assert version["tags"]["ptbin.source"] == f"{source.url}/#/models/{name}/versions/{number}"
                assert version["run_link"].startswith(f"{source.url}/#/experiments/")
                assert version["description"] == old["description"]
                assert (version["metrics"], version["params"]) == (old["metrics"], old["params"])
                assert version["own_metrics"] == old["own_metrics"]
                assert (version["status"], version["run_status"]) == ("READY", "FINISHED")
                for path, digest in old["files"].items():
                    if not path.endswith((".pth", ".pt", ".ckpt")):
                        assert version["files"][path] == digest, "side files go along untouched"
                assert not any(path.endswith((".pth", ".pt", ".ckpt")) for path in version["files"])
        assert {
            "LICENSE",
            "config.json",
            "weights.bin",
            "weights.bin.manifest.json",
            "weights.bin.intoto.json",
        } <= set(after["folders"]["versions"]["1"]["files"])
        assert not any("PENDING" in status for status in after["_logged"])

        # The same again changes nothing.
        status, summary, _ = migrate(*words)
        assert status == 1
        assert (summary["migrated"], summary["up_to_date"], summary["updated"]) == (0, 5, 0)
        assert dest.run("state") == after

        # From there, server to storage inside one S3, as Hugging Face names things.
        home = f"s3://{bucket}/registry"
        hf = (dest.uri, home, "--layout", "hf", "--source-options", options, "--dest-options", options)
        status, summary, log = migrate(*hf)
        assert (status, summary.get("migrated")) == (0, 5), log
        store, root = open_store(home, moto_s3.storage_options)
        record = json.loads(store.read_bytes(f"{root}/classifier/registry.json"))
        assert record["aliases"] == {"champion": "2", "challenger": "5"}
        assert [row["version"] for row in record["versions"]] == ["2", "5"]
        assert record["versions"][0]["origin"]["registry"] == dest.uri
        assert {metric["key"] for metric in record["versions"][0]["metrics"]} == {"accuracy", "loss"}
        names = {item.path for item in store.iter_objects(f"{root}/folders/1")}
        assert {"pytorch_model.bin", "config.json", "LICENSE"} <= names
        status, summary, _ = migrate(*hf)
        assert (status, summary["migrated"], summary["up_to_date"]) == (0, 0, 5)


def test_straight_into_a_hugging_face_layout_on_s3(
    filled: tuple[MlflowServer, dict[str, Any], Path], migrate: Any, moto_s3: S3Endpoint
) -> None:
    source, said, marker = filled
    nets = load_nets()
    home = f"s3://{moto_s3.make_bucket()}/registry"
    words = (source.uri, home, "--layout", "hf", "--dest-options", json.dumps(moto_s3.storage_options))
    status, summary, log = migrate(*words)
    assert status == 1, log
    assert (summary["migrated"], summary["rejected"], summary["failed"]) == (5, 2, 0)
    assert {problem["reason"] for problem in summary["problems"]} == {"unsafe_pickle", "corrupt_archive"}
    assert not marker.exists()
    store, root = open_store(home, moto_s3.storage_options)
    found: dict[str, dict[str, list[float]]] = {}
    for name in GOOD:
        for alias, version in json.loads(store.read_bytes(f"{root}/{name}/registry.json"))["aliases"].items():
            data = store.read_bytes(f"{root}/{name}/{version}/pytorch_model.bin")
            weights = torch.load(io.BytesIO(data), weights_only=True)
            net = nets.Classifier().eval()
            net.load_state_dict({key.removeprefix("net."): value for key, value in weights.items()})
            found.setdefault(name, {})[alias] = nets.answer(net)
    assert found == said
    before = {item.path: item.identity for item in store.iter_objects(root) if "_ptbin" not in item.path}
    status, summary, _ = migrate(*words)
    assert (summary["migrated"], summary["up_to_date"]) == (0, 5)
    after = {item.path: item.identity for item in store.iter_objects(root) if "_ptbin" not in item.path}
    assert after == before


def load_nets() -> Any:
    """The module with the classes of those who trained."""
    path = Path(__file__).parents[1] / "servers" / "mlflow_scripts" / "nets.py"
    spec = importlib.util.spec_from_file_location("mlflow_nets", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


KILLS = {
    "as the place is made": ("ptbin.registries.mlflow_registry", "MlflowRegistry.place", 3),
    "as files are there": ("ptbin.registries.transfer", "publish_at", 2),
    "as a version is registered": ("mlflow", "MlflowClient.create_model_version", 1),
    "as a model is registered": ("ptbin.registries.mlflow_registry", "MlflowRegistry.register", 1),
}
KILLED = """
import importlib, os, sys
module, path, count = {module!r}, {path!r}, {count}
owner = importlib.import_module(module)
*outer, name = path.split(".")
for part in outer:
    owner = getattr(owner, part)
real, calls = getattr(owner, name), []
def killed(*args, **kwargs):
    found = real(*args, **kwargs)
    calls.append(1)
    if len(calls) == count:
        os.kill(os.getpid(), 9)
    return found
setattr(owner, name, killed)
from flows.cli import main
main()
"""


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(("as a version is registered",), id="one moment"),
        pytest.param(tuple(KILLS), id="every moment", marks=pytest.mark.slow),
    ],
)
def test_killed_half_way_and_run_again(
    moments: tuple[str, ...],
    filled: tuple[MlflowServer, dict[str, Any], Path],
    migrate: Any,
    ptbin: Run,
    empty: Path,
    tmp_path: Path,
    server: Orchestrator,
) -> None:
    source, said, _ = filled
    with run_mlflow(tmp_path / "dest", database=empty) as dest:
        for moment in moments:
            module, path, count = KILLS[moment]
            code = KILLED.format(module=module, path=path, count=count)
            done = ptbin("migrate", source.uri, dest.uri, code=code, PREFECT_API_URL=server.api_url)
            assert done.returncode == -9, (moment, done.stderr[-2000:])
            found = dest.run("state")
            for name in GOOD:
                for number, version in found.get(name, {"versions": {}})["versions"].items():
                    assert any(path.endswith(".bin") for path in version["files"]), (moment, name, number)
        status, _, log = migrate(source.uri, dest.uri)
        assert status == 1, log
        assert dest.run("use") == said
        state = dest.run("state")
        assert not any("PENDING" in status for status in state["_logged"]), "nothing half made is left"
        assert len(state["_logged"]) == 5
    if len(moments) < len(KILLS):
        return
    with run_mlflow(tmp_path / "undisturbed", database=empty) as undisturbed:
        status, _, log = migrate(source.uri, undisturbed.uri)
        assert status == 1, log
        calm = without_run(undisturbed.run("state"))
        for name, model in without_run(state).items():
            assert model == calm[name], name
        assert set(calm) == set(state)


def test_moved_aliases_follow_and_those_of_others_stay(
    filled: tuple[MlflowServer, dict[str, Any], Path], migrate: Any, empty: Path, tmp_path: Path
) -> None:
    source, _, _ = filled
    folder = tmp_path / "dest"
    # A database without its server: what a migration on the machine itself does.
    artifacts = ("--default-artifact-root", str(folder / "artifacts"), "--no-serve-artifacts")
    with run_mlflow(folder, artifacts, database=empty):
        pass
    dest = f"mlflow+sqlite:///{folder}/mlflow.db"
    status, summary, log = migrate(source.uri, dest, "--include", "folders")
    assert (status, summary.get("migrated")) == (0, 2), log
    assert {row["dest_version"] for row in summary["versions"]} == {"1", "2"}
    status, summary, _ = migrate(source.uri, dest, "--include", "folders", "--versions", "latest")
    assert (status, summary["up_to_date"], summary["updated"]) == (0, 1, 0)


def test_calls_that_cannot_work(ptbin: Run, tmp_path: Path) -> None:
    for words, said in (
        (("mlflow+http://127.0.0.1:9", "out"), "no MLflow server answers"),
        (("mlflow+sqlite:////nowhere/x.db", "out"), "no such database file"),
        (("missing", "out"), "no such directory"),
        (("mlflow+http://127.0.0.1:9", "out", "--layout", "nonsense"), "neither mirror, hf or triton"),
    ):
        done = ptbin("migrate", *words)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert not (tmp_path / "out").exists()
