"""What of deployments/ cannot run here is held against the schemas and lints of those who run it."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.utilities.importtools import import_object

from tests.servers.prefect_stack import ROOT

FOLDER = ROOT / "deployments"
DEPLOYMENTS = yaml.safe_load((FOLDER / "prefect.yaml").read_text())["deployments"]
FLOWS = ("convert", "migrate", "restore", "sync", "verify")
KINDS = ("process", "docker", "kubernetes")


def flow_of(deployment: dict[str, Any]) -> Any:
    return import_object(deployment["entrypoint"])


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=lambda item: item["name"])
def test_a_deployment_names_a_flow_and_parameters_that_it_takes(deployment: dict[str, Any]) -> None:
    flow = flow_of(deployment)
    known = flow.parameters.properties
    assert deployment["parameters"].keys() <= known.keys()
    flow.validate_parameters({"source": "a", "dest": "b"} & known.keys() and deployment["parameters"])
    assert deployment["tags"]
    assert deployment["description"]
    assert deployment["concurrency_limit"]["limit"] == 1
    assert deployment["work_pool"]["name"] in {f"ptbin-{kind}" for kind in KINDS}


def test_every_flow_has_a_deployment_and_cron_strings_are_some() -> None:
    from prefect.client.schemas.schedules import CronSchedule

    assert {flow_of(item).name for item in DEPLOYMENTS} == set(FLOWS)
    crons = [schedule["cron"] for item in DEPLOYMENTS for schedule in item.get("schedules", ())]
    assert len(crons) >= 3
    assert [CronSchedule(cron=cron).cron for cron in crons] == crons  # refuses what is none


@pytest.mark.parametrize("name", FLOWS)
def test_every_parameter_of_every_flow_is_described(name: str) -> None:
    flow = import_object(f"flows.{name}.{name}")
    bare = [key for key, value in flow.parameters.properties.items() if not value.get("description")]
    assert bare == []


@pytest.mark.parametrize("kind", KINDS)
def test_base_job_templates_are_what_their_workers_take(kind: str) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.workers.process import ProcessJobConfiguration

    template = json.loads((FOLDER / "work-pools" / f"{kind}.json").read_text())
    properties = template["variables"]["properties"]
    used = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert used == properties.keys()
    if kind == "process":
        configuration: Any = ProcessJobConfiguration
    elif kind == "docker":
        configuration = pytest.importorskip("prefect_docker.worker").DockerWorkerJobConfiguration
    else:
        configuration = pytest.importorskip("prefect_kubernetes.worker").KubernetesWorkerJobConfiguration
    # Nothing is asked of a server, but Prefect would start one where none is named.
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        made = asyncio.run(configuration.from_template_and_values(template, {}))
    if kind == "docker":
        assert (made.image, made.auto_remove, made.privileged) == ("ptbin:latest", True, False)
    if kind == "kubernetes":
        manifest = made.job_manifest
        manifest["spec"]["template"]["spec"]["containers"][0].pop(
            "env"
        )  # a list only once the job is prepared
        manifest["metadata"] = {"generateName": "x-"}
        manifest["spec"]["template"]["spec"]["containers"][0]["args"] = ["prefect"]
        validate_kubernetes(manifest)


def validate_kubernetes(document: dict[str, Any]) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    kubernetes_validate.validate(document, "1.31", strict=True)


@pytest.mark.parametrize("path", sorted((FOLDER / "kubernetes").glob("*.yaml")), ids=lambda path: path.stem)
def test_kubernetes_documents_satisfy_kubernetes_schema(path: Path) -> None:
    documents = list(yaml.safe_load_all(path.read_text()))
    assert documents
    for document in documents:
        validate_kubernetes(document)


def test_the_compose_file_satisfies_the_compose_specification() -> None:
    compose_spec = pytest.importorskip("compose_spec")
    content = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    compose_spec.ComposeSpecification.model_validate(content)
    services = content["services"]
    for name, service in services.items():
        assert all(other in services for other in service.get("depends_on", {})), name
        assert all(str(port).startswith("127.0.0.1:") for port in service.get("ports", ())), name
        image = service.get("image", "")
        assert image == "ptbin:latest" or ":" in image, name
    needed = {"postgres", "redis", "migrate", "server", "services", "worker"}
    assert needed <= services.keys()
    assert {name for name, service in services.items() if "healthcheck" not in service} == {"migrate"}


def test_the_compose_file_sets_variables_that_prefect_knows() -> None:
    from prefect.settings import Settings
    from prefect.settings.legacy import _get_settings_fields

    known = set(_get_settings_fields(Settings))
    content = yaml.safe_load((FOLDER / "compose.yaml").read_text())
    named = {name for service in content["services"].values() for name in service.get("environment", {})}
    redis = {f"PREFECT_REDIS_MESSAGING_{name}" for name in ("HOST", "PORT", "DB")}
    assert {name for name in named if name.startswith("PREFECT_")} - redis <= known
    pytest.importorskip("prefect_redis.messaging")
    pytest.importorskip("prefect_redis.ordering")
    pytest.importorskip("prefect_redis.lease_storage")


def test_the_kubernetes_worker_watches_only_where_its_role_lets_it() -> None:
    settings = pytest.importorskip("prefect_kubernetes.settings")
    documents = list(yaml.safe_load_all((FOLDER / "kubernetes" / "worker.yaml").read_text()))
    (role,) = [document for document in documents if document["kind"] == "Role"]
    (worker,) = [document for document in documents if document["kind"] == "Deployment"]
    environment = {
        item["name"]: item["value"] for item in worker["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    with pytest.MonkeyPatch.context() as patch:
        name = "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES"
        patch.setenv(name, environment[name])
        assert settings.KubernetesSettings().observer.namespaces == {role["metadata"]["namespace"]}


def test_a_drained_pool_is_one_in_which_nothing_runs_twice_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    drain = runpy.run_path(str(FOLDER / "drain.py"))
    asked = []
    answers = [["one"], [], ["another"], [], []]

    class Client:
        async def __aenter__(self) -> Self:
            return self

        async def __aexit__(self, *error: object) -> None: ...

        async def update_work_pool(self, *words: Any) -> None: ...

        async def read_flow_runs(self, **question: Any) -> list[Any]:
            asked.append(question)
            return [SimpleNamespace(name=name) for name in answers[len(asked) - 1]]

    monkeypatch.setitem(drain["drain"].__globals__, "get_client", Client)
    assert asyncio.run(drain["drain"]("pool", 60, poll_seconds=0)) == 0
    assert len(asked) == len(answers)


@pytest.mark.starts_processes
def test_the_dockerfile_passes_hadolint_and_is_not_root() -> None:
    program = Path(sys.executable).with_name("hadolint")
    if not program.exists() and shutil.which("hadolint") is None:
        pytest.skip("no hadolint here")
    found = str(program) if program.exists() else "hadolint"
    done = subprocess.run([found, str(FOLDER / "Dockerfile")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (FOLDER / "Dockerfile").read_text()
    assert "USER 10001:10001" in text
    lines = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    copied = {word for line in lines for word in line.split()}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert all((ROOT / name).exists() and f"!{name}" in ignored for name in copied)


@pytest.mark.parametrize("path", sorted((FOLDER / "automations").glob("*.yaml")), ids=lambda path: path.stem)
def test_automations_are_what_prefect_takes(path: Path) -> None:
    document = yaml.safe_load(path.read_text())
    places = [action for action in document["actions"] if "block_document_id" in action]
    if places:  # as it stands it is refused: nobody has said which block
        with pytest.raises(ValueError, match="block_document_id"):
            AutomationCore.model_validate(document)
    for action in places:
        action["block_document_id"] = str(uuid.uuid4())
    automation = AutomationCore.model_validate(document)
    assert automation.enabled
    assert automation.actions


def test_no_secret_and_no_machine_stands_in_any_file() -> None:
    for path in FOLDER.rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            text = path.read_text()
            assert not re.search(r"AKIA[0-9A-Z]{16}|-----BEGIN|ghp_|/root/|/work/", text), path
            for secret in re.findall(r'"secret": "([^"]*)"', text):
                assert secret.startswith(("change-me", "...")), path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["arrivals.py", "s3://b", "--listen", "host:port"], "is not HOST:PORT"),
        (["arrivals.py", "s3://b", "--listen", "127.0.0.1:1", "--token-variable", "NOT_SET"], "is not set"),
        (["arrivals.py", "s3://b", "--every", "soon"], "is not a duration"),
        (["arrivals.py", "bucket"], "such as s3://"),
        pytest.param(["automate.py", "crashed-runs"], "does not answer", marks=pytest.mark.thorough),
        pytest.param(["drain.py", "ptbin-process"], "does not answer", marks=pytest.mark.thorough),
        (["drain.py", "ptbin-process", "--timeout", "soon"], "is not a duration"),
    ],
    ids=str,
)
def test_an_operators_script_that_cannot_work_says_why_in_one_line(
    words: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    monkeypatch.setattr(sys, "argv", words)
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        try:
            status = runpy.run_path(str(FOLDER / words[0]))["main"]()
        except SystemExit as end:
            status = end.code
    told = capsys.readouterr()
    assert (status, told.out) == (2, "")
    assert said in told.err.splitlines()[-1]


def test_a_port_alone_is_heard_on_this_machine_alone() -> None:
    script = runpy.run_path(str(FOLDER / "arrivals.py"))
    assert script["as_address"](":8765") == script["as_address"]("8765") == ("127.0.0.1", 8765)


@pytest.mark.parametrize(
    ("values", "taken"),
    [
        ({"source_options": '{"secret": "oops"}'}, False),
        ({"dest_options": "oops"}, False),
        ({"dest_options": "block:minio-credentials/weights", "source_options": "env:NAME"}, True),
        ({"source_options": None}, True),
        ({"rename": ["x"]}, False),
        ({"rename": ["^model=net"]}, True),
    ],
)
def test_what_a_run_would_refuse_is_refused_by_the_form(values: dict[str, Any], *, taken: bool) -> None:
    from prefect.utilities.schema_tools import is_valid_schema, validate

    schema = import_object("flows.convert.convert").parameters.model_dump()
    is_valid_schema(schema)
    problems = validate({"source": "a", "dest": "b"} | values, schema, raise_on_error=False)
    assert (not problems) == taken
