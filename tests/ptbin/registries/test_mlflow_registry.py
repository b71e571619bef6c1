"""The MLflow registry against MLflow's own store: a database without a server, in this process."""

from __future__ import annotations

import math
import os
import re
import shutil
import sqlite3
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ptbin.errors import UsageError
from ptbin.options import ConvertOptions
from ptbin.registries import open_registry
from ptbin.registries.base import Registration, RegistryError, VersionSite
from ptbin.registries.migration import prepare
from ptbin.registries.mlflow_client import Connection
from ptbin.registries.mlflow_registry import MlflowRegistry
from ptbin.registries.values import Metric, Model, RunLink, Version

# MLflow and what it imports warn of one another.
pytestmark = [pytest.mark.thorough, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def _mlflow_as_it_was() -> Iterator[None]:
    """What MLflow's client is told by way of the process goes again: other tests start processes."""
    before = dict(os.environ)
    yield
    import mlflow

    mlflow.set_tracking_uri("")  # none, as before the first call
    for name in [name for name in os.environ if name.startswith("MLFLOW_") and name not in before]:
        del os.environ[name]


@pytest.fixture(scope="module")
def _blank_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import mlflow

    path = tmp_path_factory.mktemp("mlflow") / "blank.db"
    mlflow.MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_registered_models()
    return path


@pytest.fixture
def database(_blank_database: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mlflow.db"
    shutil.copy(_blank_database, path)
    return path


@pytest.fixture
def registry(database: Path) -> MlflowRegistry:
    return MlflowRegistry(f"mlflow+sqlite:///{database}")


@pytest.fixture
def client(database: Path) -> Any:
    """MLflow's own, on the same database."""
    import mlflow

    return mlflow.MlflowClient(f"sqlite:///{database}", f"sqlite:///{database}")


def version(name: str, model: str = "m", **more: Any) -> Version:
    return Version(model, name, "revision", uri=f"s3://old/{model}/{name}", **more)


def ready(registry: MlflowRegistry, new: Version, dest: str, *aliases: str) -> Registration:
    fingerprint = new.fingerprint("options")
    place = registry.place(Model(new.model), new, dest, fingerprint)
    return Registration(new, dest, fingerprint, place.token, (), aliases, "s3://old", "run-1")


def migrate(registry: MlflowRegistry, good: list[str], bad: list[str], name: str = "m") -> dict[str, str]:
    """What a run does with versions of which some turn out to be bad; what each good one is called then."""
    there = registry.existing([name]).get(name)
    done = there.by_fingerprint() if there is not None else {}
    fresh = [
        version(text)
        for text in sorted(good + bad, key=int)
        if version(text).fingerprint("options") not in done
    ]
    planned = zip(registry.name_versions(there, fresh), fresh, strict=True)
    jobs = [
        ready(registry, new, planned_name.text)
        for planned_name, new in sorted(planned, key=lambda pair: int(pair[0].text))
        if new.version in good
    ]
    registry.register(Model(name), jobs)
    found = registry.existing([name])[name].versions
    return {kept.origin.version: kept.version for kept in found if kept.origin is not None}


# -- names -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("there", "fresh", "names"),
    [
        ([], ["2", "3", "4", "5"], ["2", "3", "4", "5"]),
        (["2", "5"], ["3", "4", "6"], ["7", "8", "6"]),
        (["2", "5"], ["3", "6", "7", "200"], ["8", "6", "7", "9"]),
        ([], ["v1", "v2", "1"], ["2", "3", "1"]),
        ([], ["1", "500", "9" * 5000], ["1", "2", "3"]),
        (["4"], ["4", "0", "5"], ["6", "7", "5"]),
    ],
)
def test_whatever_can_keep_its_number_does_and_the_others_come_behind(
    there: list[str], fresh: list[str], names: list[str]
) -> None:
    registry = MlflowRegistry("mlflow+http://127.0.0.1:9")
    existing = Model("m", versions=tuple(map(version, there))) if there else None
    assert [name.text for name in registry.name_versions(existing, list(map(version, fresh)))] == names


def test_bad_versions_use_up_no_numbers_however_often_they_are_tried(registry: MlflowRegistry) -> None:
    assert migrate(registry, ["2", "5"], ["3", "4"]) == {"2": "2", "5": "5"}
    assert migrate(registry, ["2", "5", "6"], ["3", "4"]) == {"2": "2", "5": "5", "6": "6"}
    for _ in range(2):
        migrate(registry, ["2", "5", "6"], ["3", "4"])
    assert migrate(registry, ["2", "4", "5", "6", "7"], ["3"]) == {
        **dict(zip("2567", "2567", strict=True)),
        "4": "8",
    }


@pytest.mark.parametrize(
    "alias", ["v1", "V12", "v1.0", "latest", "Latest", "", "two words", "a/b", "x" * 256]
)
def test_an_alias_that_mlflow_refuses_is_a_problem(registry: MlflowRegistry, alias: str) -> None:
    problem = registry.alias_problem(alias, ["1"])
    assert problem
    assert "\n" not in problem
    registry.register(Model("m"), [ready(registry, version("1"), "1")])
    with pytest.raises(RegistryError):
        registry.update(Model("m"), {alias: "1"}, [])


@pytest.mark.parametrize("alias", ["champion", "v1-rc", "prod_2", "7"])
def test_an_alias_that_mlflow_takes_is_none(registry: MlflowRegistry, alias: str) -> None:
    assert registry.alias_problem(alias, ["1"]) is None
    registry.register(Model("m"), [ready(registry, version("1"), "1", alias)])
    assert registry.existing(["m"])["m"].aliases == {alias: "1"}


def test_one_refused_alias_stops_no_other(registry: MlflowRegistry) -> None:
    jobs = [
        ready(registry, version("1"), "1", "v1.0", "champion"),
        ready(registry, version("2"), "2", "v2", "next"),
    ]
    with pytest.raises(RegistryError, match=r"v1\.0.*v2"):
        registry.register(Model("m"), jobs)
    found = registry.existing(["m"])["m"]
    assert [kept.version for kept in found.versions] == ["1", "2"]
    assert found.aliases == {"champion": "1", "next": "2"}
    with pytest.raises(RegistryError, match="latest"):
        registry.update(
            Model("m", "Said."), {"latest": "1", "other": "2"}, [("1", version("1", tags={"a": "b"}))]
        )
    found = registry.existing(["m"])["m"]
    assert (found.description, found.aliases["other"], found.versions[0].tags) == ("Said.", "2", {"a": "b"})


# -- what is there ---------------------------------------------------------------------------------------


def test_a_name_with_both_kinds_of_quotes(registry: MlflowRegistry) -> None:
    for name in ("""bo'th"x""", """boath"x""", "it's", 'say "x"'):
        registry.register(Model(name), [ready(registry, version("1", name), "1", "champion")])
    models = registry.models(lambda name: True)
    assert [(model.name, model.problem, len(model.versions)) for model in models] == [
        ("""bo'th"x""", "", 1),
        ("""boath"x""", "", 1),
        ("it's", "", 1),
        ('say "x"', "", 1),
    ]
    assert registry.existing(["""bo'th"x"""])["""bo'th"x"""].versions == models[0].versions


def test_what_is_wrong_with_one_model_is_its_problem_alone(
    registry: MlflowRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        registry.register(Model(name), [ready(registry, version("1", name), "1")])
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from mlflow.protos import databricks_pb2

    real, code = MlflowClient.search_model_versions, databricks_pb2.INVALID_PARAMETER_VALUE

    def broken(self: MlflowClient, wanted: str, **more: Any) -> Any:
        if wanted == "name = 'a'":
            raise MlflowException("no such thing", error_code=code)
        return real(self, wanted, **more)

    monkeypatch.setattr(MlflowClient, "search_model_versions", broken)
    for models in (registry.models(lambda name: True), list(registry.existing(["a", "b", "c"]).values())):
        assert [(model.name, bool(model.problem)) for model in models] == [("a", True), ("b", False)]
        assert "no such thing" in models[0].problem
    code = databricks_pb2.TEMPORARILY_UNAVAILABLE
    with pytest.raises(RegistryError, match="no such thing"):
        registry.models(lambda name: True)
    with pytest.raises(RegistryError, match="no such thing"):
        registry.existing(["a"])
    assert registry.has_models(lambda name: name == "a"), "asks for names alone"
    assert not registry.has_models(lambda name: name == "c")


def test_versions_that_are_not_ready_are_none_at_a_source(registry: MlflowRegistry, database: Path) -> None:
    registry.register(Model("m"), [ready(registry, version(number), number) for number in "123"])
    with sqlite3.connect(database) as connection:
        for number, status in (("1", "PENDING_REGISTRATION"), ("3", "FAILED_REGISTRATION")):
            connection.execute("UPDATE model_versions SET status = ? WHERE version = ?", (status, number))
    connection.close()
    (model,) = registry.models(lambda name: True)
    assert [found.version for found in model.versions] == ["2"]
    there = registry.existing(["m"])["m"]
    assert [found.version for found in there.versions] == ["1", "2", "3"], "their numbers are taken"


def test_last_values_of_metrics_without_their_histories(
    registry: MlflowRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = (Metric("loss", 0.25, 9, 1700), Metric("accuracy", float("nan"), 3, 1800))
    registry.register(Model("m"), [ready(registry, version("1", metrics=metrics), "1")])
    (found,) = registry.existing(["m"])["m"].versions
    assert found.run is not None
    for step in range(5):
        client.log_metric(found.run.run_id, "loss", 0.5, timestamp=1600, step=step)
    monkeypatch.setattr(type(client), "get_metric_history", None)
    accuracy, loss = registry.detail(found).metrics
    assert loss == metrics[0]
    assert (accuracy.key, accuracy.step, accuracy.timestamp) == ("accuracy", 3, 1800)
    assert math.isnan(accuracy.value)


def test_a_link_to_the_training_run_goes_on_from_registry_to_registry(
    registry: MlflowRegistry, client: Any
) -> None:
    link = RunLink("0123", "net", "training", "https://old/runs/0123")
    registry.register(Model("m"), [ready(registry, version("1", run=link), "1")])
    (found,) = registry.existing(["m"])["m"].versions
    run = registry.detail(found).run
    assert run is not None
    assert run.url == link.url
    client.create_model_version("m", "/somewhere", run_link="https://elsewhere/9")
    (_, without_run) = registry.existing(["m"])["m"].versions
    assert registry.detail(without_run).run == RunLink("", url="https://elsewhere/9")


def test_tags_of_an_earlier_migration_are_not_taken_for_ours(registry: MlflowRegistry, client: Any) -> None:
    tags = {"ptbin.fingerprint": "theirs", "ptbin.placeholder": "true", "team": "vision"}
    new = version("1", tags=tags)
    registry.register(Model("m", tags=tags), [ready(registry, new, "1")])
    registry.update(Model("m", tags=tags | {"ptbin.more": "x"}), {}, [("1", new)])
    model = client.get_registered_model("m")
    assert dict(model.tags) == {"team": "vision"}
    found = dict(client.get_model_version("m", "1").tags)
    assert found["ptbin.fingerprint"] == new.fingerprint("options")
    assert "ptbin.placeholder" not in found
    assert found["team"] == "vision"


# -- half done -------------------------------------------------------------------------------------------


def killed_before_its_logged_model(registry: MlflowRegistry, new: Version, patch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    with patch.context() as here:
        here.setattr("mlflow.MlflowClient.create_logged_model", killed)
        with pytest.raises(SystemExit):
            registry.place(Model("m"), new, "1", new.fingerprint("options"))


def runs(client: Any, *, deleted: bool = False) -> list[str]:
    from mlflow.entities import ViewType

    experiment = client.get_experiment_by_name("ptbin").experiment_id
    view = ViewType.DELETED_ONLY if deleted else ViewType.ACTIVE_ONLY
    return [run.info.status for run in client.search_runs([experiment], run_view_type=view)]


def test_a_run_that_was_begun_is_taken_up_and_ends_with_its_version(
    registry: MlflowRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = version("1")
    killed_before_its_logged_model(registry, new, monkeypatch)
    assert runs(client) == ["RUNNING"]
    place = registry.place(Model("m"), new, "1", new.fingerprint("options"))
    assert isinstance(place, VersionSite)
    assert runs(client) == ["RUNNING"], "the same again"
    registry.abandon(place)
    assert (runs(client), runs(client, deleted=True)) == ([], ["FAILED"])


@pytest.mark.parametrize("moment", ["delete_model_version", "delete_model_version_tag"])
def test_a_kill_among_numbers_that_are_used_up_moves_no_version_off_its_own(
    moment: str, registry: MlflowRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = ready(registry, version("3"), "3", "champion")
    registry.register(Model("m"), [])
    real = getattr(client, moment)
    if moment.endswith("tag"):
        # Numbers that nobody sees any more: the one that is to be used up is the wanted one already.
        for _ in range(2):
            client.delete_model_version("m", client.create_model_version("m", "/somewhere").version)

    def killed(_: Any, *args: Any, **more: Any) -> None:
        if not moment.endswith("tag"):
            real(*args, **more)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(type(client), moment, killed)
        with pytest.raises(SystemExit):
            registry.register(Model("m"), [job])
    assert registry.existing(["m"])["m"].versions == ()
    assert registry.register(Model("m"), [job]) == ["3"]
    found = registry.existing(["m"])["m"]
    assert [(kept.version, kept.tags) for kept in found.versions] == [("3", {})]
    assert found.aliases == {"champion": "3"}
    assert client.create_model_version("m", "/somewhere").version in (4, "4")


def test_what_nobody_takes_up_is_tidied_away(
    registry: MlflowRegistry, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.tidy(set())
    assert client.get_experiment_by_name("ptbin") is None, "looking makes nothing"
    registry.register(Model("m"), [ready(registry, version("1"), "1")])
    killed_before_its_logged_model(registry, version("2"), monkeypatch)
    kept = ready(registry, version("3"), "3")
    left = ready(registry, version("4"), "4")
    registry.tidy({kept.fingerprint})
    assert sorted(runs(client)) == ["FINISHED", "RUNNING"]
    assert ready(registry, version("3"), "3").token == kept.token
    assert ready(registry, version("4"), "4").token != left.token


def test_the_way_back_of_the_documentation(registry: MlflowRegistry, client: Any, database: Path) -> None:
    """More versions than a page has, names that no filter takes, and somebody else's version stays."""
    text = (Path(__file__).parents[3] / "docs" / "migration.md").read_text()
    (block,) = [
        part for part in re.findall(r"     ```python\n(.*?)     ```\n", text, re.DOTALL) if "delete" in part
    ]
    for name in ("""bo'th"x""", "it's"):
        registry.register(Model(name), [ready(registry, version("1", name), "1")])
    registry.register(Model("m"), [])
    for number in range(120):
        tags = {"ptbin.fingerprint": str(number)} if number != 50 else {}
        client.create_model_version("m", "/somewhere", tags=tags)
    exec(textwrap.dedent(block).replace("http://new:5000", f"sqlite:///{database}"), {})  # noqa: S102 - our own page
    left = {model.name: model.versions for model in registry.models(lambda name: True)}
    assert [found.version for found in left.pop("m")] == ["51"]
    assert set(left.values()) == {()}
    assert client.get_experiment_by_name("ptbin").lifecycle_stage == "deleted"


# -- reaching it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["empty", "another program's", "no database", "an older MLflow's"])
def test_a_database_that_is_not_mlflows_is_left_alone(content: str, tmp_path: Path, database: Path) -> None:
    path = tmp_path / "other.db"
    said = "not a database of MLflow"
    if content == "no database":
        path.write_bytes(b"some text " * 500)
        said = "the database cannot be read"
    elif content == "an older MLflow's":
        shutil.copy(database, path)
        with sqlite3.connect(path) as connection:
            connection.execute("DROP TABLE webhook_events")
        connection.close()
        said = "without webhook_events: MLflow's client would change it"
    elif content == "another program's":
        path = tmp_path / "other 100%.db"
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE invoices (number)")
        connection.close()
    else:
        path.touch()
    before = path.read_bytes()
    with pytest.raises(UsageError, match=said):
        MlflowRegistry(f"mlflow+sqlite:///{path}").check_readable()
    assert path.read_bytes() == before
    assert sorted(item.name for item in tmp_path.iterdir()) == ["mlflow.db", path.name]


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("file:///a%20b/c", "/a b/c"),
        ("file:/a%2Fb", "/a/b"),
        ("/plain/path", "/plain/path"),
        ("s3://bucket/a%20b", "s3://bucket/a%20b"),
    ],
)
def test_where_artifacts_lie(uri: str, path: str) -> None:
    assert Connection("mlflow+http://127.0.0.1:9").place(uri).uri == path


def test_a_server_that_goes_away_is_given_up_soon_and_tried_again_by_the_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Healthy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET  # noqa: N815 - http.server's names

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = HTTPServer(("127.0.0.1", 0), Healthy)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    registry = MlflowRegistry(f"mlflow+http://127.0.0.1:{server.server_address[1]}")
    try:
        registry.check_readable()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    waits: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time", SimpleNamespace(sleep=waits.append, time=time.time))
    with pytest.raises(RegistryError) as caught:
        registry.check_readable()
    assert caught.value.transient
    assert 0 < sum(waits) < 20, "MLflow's own default is four minutes"
    with pytest.raises(RegistryError, match="no MLflow server answers") as caught:
        MlflowRegistry(registry.uri).check_readable()
    assert caught.value.transient


def test_a_registered_model_without_versions_is_named(
    registry: MlflowRegistry, client: Any, tmp_path: Path
) -> None:
    client.create_registered_model("empty", description="not trained yet")
    found = prepare(
        registry, open_registry(str(tmp_path / "dest"), None, {}), (), (), "all", ConvertOptions()
    )
    (model,) = found.models
    assert (model.model.name, model.steps, model.problem) == ("empty", (), "")
    assert "without versions" in model.not_kept[0]
