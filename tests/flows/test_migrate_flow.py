"""Migrations between directory registries, on files and on S3, and into and out of a Hugging Face Hub."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import ptbin as engine
from flows.migrate import migrate
from flows.prefect.orchestrator import Orchestrator
from flows.verify import verify
from ptbin.errors import UsageError
from ptbin.runs.run_ids import new_run_id
from ptbin.stores import open_store
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3
from tests.servers.hub import Hub, run_hub

__all__ = ["moto_s3"]

pytestmark = pytest.mark.usefixtures("server")

SCHEMA = json.loads((Path(engine.__file__).parent / "manifest.schema.json").read_text())
HOSTILE = b"cposix\nsystem\n(S'touch /tmp/never'\ntR."


@dataclass
class Pair:
    """SOURCE with models and versions as their owner laid them out, DEST empty."""

    root: str
    options: dict[str, Any]
    blank: bytes
    summary: dict[str, Any] = field(default_factory=dict)

    def put(self, path: str, data: bytes, name: str = "source") -> None:
        store, folder = open_store(f"{self.root}/{name}", self.options)
        store.write_bytes(f"{folder}/{path}", data)

    def read(self, path: str, name: str = "dest") -> bytes:
        store, folder = open_store(f"{self.root}/{name}", self.options)
        return store.read_bytes(f"{folder}/{path}")

    def record(self, model: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.read(f"{model}/registry.json"))
        return found

    def files(self, name: str = "dest") -> dict[str, str]:
        """Path and digest of each file but the runs' own."""
        store, folder = open_store(f"{self.root}/{name}", self.options)
        return {
            item.path: hashlib.sha256(store.read_bytes(f"{folder}/{item.path}")).hexdigest()
            for item in store.iter_objects(folder)
            if not item.path.startswith("_ptbin/")
        }

    def run(self, *, name: str = "dest", of: str = "source", **wishes: Any) -> str:
        """Migrate; the name of the final state."""
        live = LiveRun(new_run_id(), self.options, self.options)
        with open_live_run(live):
            state = migrate(
                f"{self.root}/{of}", f"{self.root}/{name}", run_id=live.run_id, return_state=True, **wishes
            )
        if "message" not in live.summary:
            error = state.result(raise_on_failure=False)
            assert isinstance(error, Exception)
            raise error
        self.summary = live.summary
        return str(state.type.value)

    def outcomes(self) -> dict[str, str]:
        return {f"{row['model']}/{row['version']}": row["outcome"] for row in self.summary["versions"]}

    def verify(self, name: str = "dest", **wishes: Any) -> list[dict[str, str]]:
        live = LiveRun(new_run_id(), self.options, self.options)
        with open_live_run(live):
            verify(f"{self.root}/{name}", run_id=live.run_id, return_state=True, **wishes)
        issues: list[dict[str, str]] = live.summary["issues"]
        return issues


# Where more of a store is asked than what the contract of stores holds (tests/contract).
ON_BOTH = pytest.mark.parametrize("pair", ["files", "s3"], indirect=True)


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path, _blank: bytes) -> Pair:
    if getattr(request, "param", "files") == "files":
        made = Pair(str(tmp_path), {}, _blank)
    else:
        endpoint: S3Endpoint = request.getfixturevalue("moto_s3")
        made = Pair(f"s3://{endpoint.make_bucket()}", endpoint.storage_options, _blank)
    made.put("resnet/1/model.pt", _blank)
    made.put("resnet/2/model.pt", _blank)
    made.put("resnet/2/labels.txt", b"cat\ndog\n")
    made.put("resnet/10/model.pt", _blank)
    made.put("resnet/config.pbtxt", b'name: "resnet"')
    made.put("bert/1/weights/last.ckpt", _blank)
    made.put("bert/1/weights/config.json", b"{}")
    made.put("bert/1/LICENSE", b"Apache")
    return made


@ON_BOTH
def test_versions_arrive_with_their_files_and_again_nothing_changes(pair: Pair) -> None:
    assert pair.run() == "COMPLETED"
    assert pair.outcomes() == dict.fromkeys(("bert/1", "resnet/1", "resnet/2", "resnet/10"), "migrated")
    files = pair.files()
    assert set(files) == {
        *("bert/registry.json", "bert/1/weights/last.bin", "bert/1/weights/last.bin.manifest.json"),
        *("bert/1/weights/config.json", "bert/1/LICENSE"),
        *("resnet/registry.json", "resnet/config.pbtxt", "resnet/2/labels.txt"),
        *(f"resnet/{n}/model.bin{suffix}" for n in (1, 2, 10) for suffix in ("", ".manifest.json")),
    }
    record = pair.record("resnet")
    assert [row["version"] for row in record["versions"]] == ["1", "2", "10"]
    assert record["versions"][1]["manifests"] == ["model.bin.manifest.json"]
    assert record["versions"][1]["origin"]["version"] == "2"
    manifest = json.loads(pair.read("resnet/2/model.bin.manifest.json"))
    jsonschema.validate(manifest, SCHEMA)
    assert manifest["registry"]["origin"]["model"] == "resnet"
    assert pair.verify() == []

    assert pair.run() == "COMPLETED"
    assert set(pair.outcomes().values()) == {"up_to_date"}
    assert pair.files() == files


def test_metadata_goes_on_from_registry_to_registry(pair: Pair) -> None:
    pair.run()
    record = pair.record("resnet")
    record |= {"description": "Fifty layers.", "tags": {"team": "vision"}, "aliases": {"champion": "2"}}
    record["versions"][1] |= {
        "description": "The good one.",
        "tags": {"reviewed": "yes"},
        "metrics": [{"key": "top1", "value": 0.76, "step": 9, "timestamp": 5, "on_version": True}],
    }
    pair.put("resnet/registry.json", json.dumps(record).encode(), "dest")
    assert pair.run(of="dest", name="next", layout="hf", versions="aliased") == "COMPLETED"
    assert pair.outcomes() == {"resnet/2": "migrated"}
    onward = json.loads(pair.read("resnet/registry.json", "next"))
    assert (onward["description"], onward["tags"], onward["aliases"]) == (
        "Fifty layers.",
        {"team": "vision"},
        {"champion": "2"},
    )
    (row,) = onward["versions"]
    assert (row["description"], row["tags"]) == ("The good one.", {"reviewed": "yes"})
    assert row["metrics"][0]["value"] == 0.76
    assert {"resnet/2/pytorch_model.bin", "resnet/2/labels.txt", "resnet/config.pbtxt"} <= set(
        pair.files("next")
    )

    # The alias moves at the source: it follows. One that somebody sets there on a version of their own stays.
    record["aliases"] = {"champion": "10", "theirs": "2"}
    pair.put("resnet/registry.json", json.dumps(record).encode(), "dest")
    onward["versions"].append({**row, "version": "77", "path": "77", "manifests": []})
    del onward["versions"][-1]["origin"]
    onward["aliases"]["theirs"] = "77"
    pair.put("resnet/registry.json", json.dumps(onward).encode(), "next")
    assert pair.run(of="dest", name="next", layout="hf") == "COMPLETED"
    after = json.loads(pair.read("resnet/registry.json", "next"))
    assert after["aliases"] == {"champion": "10", "theirs": "77"}
    assert set(pair.outcomes().values()) == {"migrated", "up_to_date"}
    assert any("champion" in str(row["aliases"]) for row in pair.summary["versions"])


def test_a_bad_version_stops_no_other_and_leaves_nothing(pair: Pair) -> None:
    pair.put("resnet/3/model.pkl", HOSTILE)
    pair.put("resnet/3/notes.txt", b"harmless")
    pair.put("resnet/4/model.pt", pair.blank[:-40])
    pair.put("sklearn/1/model.onnx", b"onnx")
    assert pair.run() == "FAILED"
    outcomes = pair.outcomes()
    assert (outcomes["resnet/3"], outcomes["resnet/4"], outcomes["resnet/10"]) == (
        "rejected",
        "rejected",
        "migrated",
    )
    assert outcomes["sklearn/1"] == "not_a_checkpoint"
    reasons = {problem["reason"] for problem in pair.summary["problems"]}
    assert reasons == {"unsafe_pickle", "corrupt_archive"}
    assert not any(path.startswith(("resnet/3", "resnet/4", "sklearn")) for path in pair.files())
    assert [row["version"] for row in pair.record("resnet")["versions"]] == ["1", "2", "10"]


def test_damage_that_only_shows_on_the_way_leaves_nothing(pair: Pair) -> None:
    damaged = bytearray(pair.blank)
    at = pair.blank.index(torch.arange(64.0).numpy().tobytes())
    damaged[at + 9] ^= 1
    pair.put("resnet/3/model.pt", bytes(damaged))
    pair.put("resnet/3/extra.txt", b"beside it")
    assert pair.run() == "FAILED"
    assert pair.outcomes()["resnet/3"] == "rejected"
    assert {problem["reason"] for problem in pair.summary["problems"]} == {"checksum_mismatch"}
    assert not any(path.startswith("resnet/3") for path in pair.files())


@ON_BOTH
def test_what_somebody_else_put_there_is_not_touched(pair: Pair) -> None:
    pair.put("resnet/1/model.bin", b"theirs", "dest")
    assert pair.run() == "FAILED"
    assert pair.outcomes()["resnet/1"] == "rejected"
    assert pair.read("resnet/1/model.bin") == b"theirs"
    assert pair.outcomes()["resnet/2"] == "migrated"


def test_choosing_models_and_versions(pair: Pair) -> None:
    assert pair.run(include=["res*"], exclude=["*bert*"], versions="latest") == "COMPLETED"
    assert pair.outcomes() == {"resnet/10": "migrated"}
    with pytest.raises(UsageError, match="no models"):
        pair.run(include=["nobody"])


@ON_BOTH
def test_a_changed_version_is_written_over(pair: Pair, tmp_path: Path) -> None:
    pair.run(include=["resnet"])
    torch.save({"other": torch.ones(5)}, tmp_path / "other.pt")
    pair.put("resnet/2/model.pt", (tmp_path / "other.pt").read_bytes())
    assert pair.run(include=["resnet"]) == "COMPLETED"
    assert pair.outcomes() == {"resnet/1": "up_to_date", "resnet/2": "migrated", "resnet/10": "up_to_date"}
    assert len(pair.record("resnet")["versions"]) == 3
    (row,) = json.loads(pair.read("resnet/2/model.bin.manifest.json"))["tensors"]
    assert row["name"] == "other"
    assert pair.verify() == []


def test_triton_in_and_out(pair: Pair) -> None:
    assert pair.run(layout="triton", source_layout="triton") == "COMPLETED"
    assert {"resnet/1/model.bin", "resnet/config.pbtxt", "bert/1/model.bin", "bert/1/config.json"} <= set(
        pair.files()
    )
    pair.put("named/first/model.pt", pair.blank)
    assert pair.run(layout="triton", include=["named"]) == "FAILED"
    assert "Triton's versions are numbers" in pair.summary["problems"][0]["detail"]


@ON_BOTH
def test_provenance_that_the_reference_library_reads(pair: Pair) -> None:
    from google.protobuf import json_format
    from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
    from in_toto_attestation.v1 import statement_pb2
    from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
    from in_toto_attestation.v1.statement import Statement

    pair.run(provenance=True)
    stored = json.loads(pair.read("resnet/2/model.bin.intoto.json"))
    message = json_format.ParseDict(stored, statement_pb2.Statement())
    Statement.copy_from_pb(message).validate()
    assert stored["subject"] == [
        {"name": "model.bin", "digest": {"sha256": pair.files()["resnet/2/model.bin"]}}
    ]
    predicate = json_format.ParseDict(stored["predicate"], provenance_pb2.Provenance())
    (dependency,) = predicate.build_definition.resolved_dependencies
    ResourceDescriptor.copy_from_pb(dependency).validate()
    assert dependency.digest["sha256"] == hashlib.sha256(pair.blank).hexdigest()
    assert dependency.annotations["size"] == len(pair.blank)
    assert ("etag" if pair.options else "mtime") in dependency.annotations
    assert predicate.build_definition.external_parameters["registry"]["model"] == "resnet"
    assert predicate.run_details.metadata.invocation_id == pair.summary["run_id"]
    assert predicate.run_details.builder.id
    assert pair.verify() == []

    stored["predicate"]["buildDefinition"]["resolvedDependencies"][0]["digest"]["sha256"] = "0" * 64
    pair.put("resnet/2/model.bin.intoto.json", json.dumps(stored).encode(), "dest")
    (issue,) = pair.verify()
    assert issue["reason"] == "provenance_mismatch"


def test_verify_holds_lists_and_records_against_manifests(pair: Pair) -> None:
    pair.run(provenance=True)
    run = pair.summary["run_id"]
    lines = pair.read(f"_ptbin/runs/{run}/SHA256SUMS").decode()
    assert lines.count("\n") == 4
    pair.put(f"_ptbin/runs/{run}/SHA256SUMS", lines.replace(lines[:8], "deadbeef", 1).encode(), "dest")
    record = pair.record("resnet")
    record["aliases"]["gone"] = "99"
    pair.put("resnet/registry.json", json.dumps(record).encode(), "dest")
    assert sorted(issue["reason"] for issue in pair.verify()) == ["bad_registry", "checksum_list_mismatch"]


def test_signatures_of_the_reference_tool(pair: Pair, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    pair.run(include=["resnet"], versions="latest")
    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    private.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    assert [issue["reason"] for issue in pair.verify(public_key=str(public))] == ["not_signed"]

    # Signed by the tool itself, which knows local folders only.
    local = tmp_path / "copy"
    local.mkdir()
    for path in pair.files():
        if path.startswith("resnet/10/"):
            (local / path.rpartition("/")[2]).write_bytes(pair.read(path))
    command = [sys.executable, "-m", "model_signing", "sign", "key", "--private_key", str(private)]
    signed = [*command, "--signature", str(local / "model.sig"), str(local)]
    subprocess.run(signed, check=True, capture_output=True)
    pair.put("resnet/10/model.sig", (local / "model.sig").read_bytes(), "dest")
    assert pair.verify(public_key=str(public)) == []

    pair.put("resnet/10/added.txt", b"by somebody else", "dest")
    (issue,) = pair.verify(public_key=str(public))
    assert issue["reason"] == "bad_signature"
    assert "added.txt" in issue["detail"]


# -- Hugging Face Hub ------------------------------------------------------------------------------


@pytest.fixture
def hub() -> Iterator[Hub]:
    with run_hub() as made:
        yield made


def test_into_a_hub_and_out_again(
    hub: Hub,
    ptbin: Callable[..., subprocess.CompletedProcess[str]],
    server: Orchestrator,
    tmp_path: Path,
    checkpoint: Path,
) -> None:
    blank = checkpoint.read_bytes()
    pair = Pair(str(tmp_path), {}, blank)
    for version in ("1", "2"):
        pair.put(f"bert/{version}/model.pt", blank)
        pair.put(f"bert/{version}/config.json", b'{"model_type": "bert"}')
    pair.put("bert/1/only-here.txt", b"gone in 2")
    pair.put("bad/1/model.pkl", HOSTILE)
    record = {
        "schema_version": 1,
        "name": "bert",
        "description": "",
        "tags": {},
        "aliases": {"champion": "1"},
    }
    versions: list[dict[str, Any]] = [
        {"version": version, "path": version, "manifests": []} for version in ("1", "2")
    ]
    pair.put("bert/registry.json", json.dumps({**record, "versions": versions}).encode())
    environment = {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "PREFECT_API_URL": server.api_url}
    options = json.dumps({"endpoint": hub.url, "token": "hf_secret"})

    def run(*words: str) -> tuple[int, dict[str, Any], str]:
        done = ptbin("migrate", *words, "--json", **environment)
        assert "hf_secret" not in done.stdout + done.stderr
        summary = json.loads(done.stdout)
        assert "migrated" in summary, summary
        return done.returncode, summary, done.stderr

    up = ("source", "hf://acme", "--dest-options", options)
    status, summary, log = run(*up)
    assert (status, summary["migrated"], summary["rejected"]) == (1, 2, 1), log
    assert set(hub.repositories) == {"acme/bert"}, "a model without a good version makes no repository"
    repository = hub.repositories["acme/bert"]
    assert repository.private, "nobody publishes by accident"
    assert repository.tags["champion"] == repository.tags["1"]
    first, second = repository.files("1"), repository.files("2")
    assert first["config.json"] == b'{"model_type": "bert"}'
    assert {"pytorch_model.bin", "pytorch_model.bin.manifest.json", "registry.json"} <= set(first)
    assert "only-here.txt" in first
    assert "only-here.txt" not in second
    weights = tmp_path / "pytorch_model.bin"
    weights.write_bytes(second["pytorch_model.bin"])
    assert torch.equal(torch.load(weights, weights_only=True)["w"], torch.arange(64.0))
    assert not [path for path in (tmp_path / "ptbin-hub-acme" / "bert").rglob("*") if path.is_file()]

    hub.requests.clear()
    status, summary, _ = run(*up)
    assert (status, summary["up_to_date"]) == (1, 2)
    assert not [request for request in hub.requests if not request.startswith(("GET", "HEAD"))]

    # Refused half-way: no version without its commit and its tag, and the next run does the rest.
    hub.repositories.clear()
    refusals = iter([500] * 40)
    hub.refuse = lambda method, path: next(refusals, None) if "/tag/" in path and method == "POST" else None
    done = ptbin("migrate", *up, "--deadline", "6", **environment)
    assert done.returncode != 0
    hub.refuse = lambda method, path: None
    status, summary, log = run(*up)
    assert status == 1, log
    assert set(hub.repositories["acme/bert"].tags) == {"1", "2", "champion"}

    status, summary, log = run("hf://acme", "back", "--source-options", options, "--versions", "aliased")
    assert (status, summary["migrated"]) == (0, 1), log
    assert json.loads(pair.read("bert/registry.json", "back"))["aliases"] == {"champion": "1"}
    assert pair.verify("back") == []


def test_a_mistake_costs_one_line(
    ptbin: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, good_source: Path
) -> None:
    for words, said in (
        (("good", "good/inside"), "lie in one another"),
        (("hf://acme/name", "out"), "names a user"),
        (("good", "out", "--layout", "{nope}"), "not a template"),
        (("good", "hf://acme", "--source-layout", "hf", "--layout", "hf"), "for directory registries"),
    ):
        done = ptbin("migrate", *words)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert sorted(os.listdir(tmp_path)) == ["good", "home"]
