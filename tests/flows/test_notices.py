"""What a run tells: tags, its state's message, the end of its log, the essence of its report, links."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import artifacts
from flows.convert import convert
from flows.notices import failure_line, state_message
from flows.prefect.orchestrator import Orchestrator
from flows.report_link import link_of, served_at
from flows.report_markdown import render_markdown
from ptbin.errors import UsageError
from ptbin.runs.outcomes import Outcome
from ptbin.runs.run_ids import new_run_id
from ptbin.runs.tally import Tally
from tasks.assets import asset_of
from tasks.batches import MAX_LISTED_FAILURES
from tasks.live import LiveRun, open_live_run
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3

__all__ = ["moto_s3"]

Database = Callable[[str], list[tuple[Any, ...]]]


def test_a_failed_run_says_what_failed_wherever_one_looks(
    source: Path, tmp_path: Path, server: Orchestrator, database: Database
) -> None:
    dest = tmp_path / "out"
    state = convert(str(source), str(dest), run_id="night-1", return_state=True)
    server.settle(None, 0)
    assert state.is_failed()
    counts, *failures, report = (state.message or "").splitlines()
    assert counts == "converted 12, up to date 0, rejected 4, failed 0, not checkpoints 1"
    assert all(line.startswith("new: ") for line in failures)
    assert sum("truncated.pt: corrupt_archive: " in line for line in failures) == 1
    page = dest / "_ptbin/runs/night-1/report.html"
    assert report == f"report: file://{page}"
    ((run_id, tags),) = database(
        "select id, tags from flow_run where name like '%/out' order by created desc limit 1"
    )
    assert json.loads(tags) == ["ptbin"]
    logged = database(f"select level, message from log where flow_run_id = '{run_id}' order by timestamp")
    (level, last), (_, end) = logged[-2:]
    assert level == 40
    assert last.splitlines() == ["4 failed:", *failures]
    assert end.startswith("Finished in state Failed(")
    assert not any("Traceback" in message for _, message in logged)
    ((essence,),) = database(
        f"select data from artifact where flow_run_id = '{run_id}' and key = 'ptbin-convert-report'"
    )
    text = json.loads(essence)
    assert text.index("### What failed") < text.index("| what | how much |")
    assert "| `truncated.pt` | **new** | `corrupt_archive` |" in text
    assert f"(file://{page})" in text


def test_a_run_that_could_not_begin_says_why_in_one_line(
    tmp_path: Path, server: Orchestrator, database: Database
) -> None:
    with pytest.raises(UsageError, match="no such file or directory"):
        convert(str(tmp_path / "nowhere"), str(tmp_path / "begun-nowhere"))
    server.settle(None, 0)
    ((run_id, state),) = database("select id, state_name from flow_run where name like '%/begun-nowhere'")
    assert state == "Failed"
    line = f"usage_error: cannot read {tmp_path / 'nowhere'}: no such file or directory"
    logged = database(f"select level, message from log where flow_run_id = '{run_id}' order by timestamp")
    assert logged[-2:] == [(40, line), (20, f"Finished in state Failed({line!r})")]
    assert not any("Traceback" in message for _, message in logged)


def test_task_runs_say_which_files_failed(source: Path, tmp_path: Path, server: Orchestrator) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with open_live_run(LiveRun(new_run_id())) as live:
        convert(str(source), str(tmp_path / "out"), run_id=live.run_id, return_state=True)
    assert server.settle(live.summary["flow_run_id"], live.summary["task_runs"])
    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[live.summary["flow_run_id"]]))
    with get_client(sync_client=True) as client:
        states = [run.state for run in client.read_task_runs(flow_run_filter=this_run) if run.state]
    assert all(state.is_completed() for state in states)
    named = {state.name: state.message or "" for state in states if state.name != "Completed"}
    told = [line for message in named.values() for line in message.splitlines()]
    assert sum(line.startswith("truncated.pt: corrupt_archive: ") for line in told) == 1
    assert sum(line.startswith("hostile.pkl: unsafe_pickle: ") for line in told) == 1
    assert all(re.fullmatch(r"[12] of \d+ failed", str(name)) for name in named)
    quiet = {state.message for state in states if state.name == "Completed"}
    assert any(message and message.startswith("converted ") for message in quiet)
    assert not any(message and "rejected" in message for message in quiet)


@pytest.mark.starts_processes
def test_what_a_run_made_is_an_asset_with_its_source(
    good_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, str, list[str], dict[str, Any]]] = []

    def emit_event(event: str, resource: dict[str, str], **rest: Any) -> None:
        if event.startswith("prefect.asset."):
            origins = [one["prefect.resource.id"] for one in rest["related"] if "asset" in one.values()]
            sent.append((event, resource["prefect.resource.id"], origins, rest.get("payload") or {}))

    monkeypatch.setattr("prefect.events.emit_event", emit_event)
    source, dest = f"file://{good_source}", f"file://{tmp_path / 'out'}"
    convert(str(good_source), str(tmp_path / "out"), return_state=True)
    made = {key: (origins, facts) for event, key, origins, facts in sent if "materialization.succ" in event}
    assert made.keys() == {dest, *(f"{dest}/{number}.bin" for number in range(6))}
    assert all(origins == [source] for origins, _ in made.values())
    assert made[dest][1]["converted"] == 6
    digest = hashlib.sha256((tmp_path / "out/3.bin").read_bytes()).hexdigest()
    assert made[f"{dest}/3.bin"][1]["sha256"] == {"3.bin": digest}

    sent.clear()
    convert(str(good_source), str(tmp_path / "out"), return_state=True)
    assert sent == [], "nothing was made"

    monkeypatch.setattr("tasks.assets.MAX_OUTPUTS", 5)
    convert(str(good_source), str(tmp_path / "out"), force=True, return_state=True)
    assert [(event.rpartition(".")[2], key) for event, key, _, _ in sent] == [
        ("referenced", source),
        ("succeeded", dest),
    ], "however many outputs there are"


@pytest.mark.parametrize(
    ("uri", "key"),
    [
        ("/srv/weights", "file:///srv/weights"),
        ("s3://models/weights", "s3://models/weights"),
        ("ftp://name:secret@host/weights", "ftp://name@host/weights"),
        ("/srv/my weights", None),
        ("mlflow+http://host:5000", None),
    ],
)
def test_a_place_that_has_no_key_is_no_asset(uri: str, key: str | None) -> None:
    asset = asset_of(uri)
    assert (asset.key if asset is not None else None) == key


def test_the_progress_artifact_is_updated_and_ends_at_100_percent(
    good_source: Path, tmp_path: Path, server: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import prefect.artifacts
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey

    told: list[float] = []
    update = prefect.artifacts.update_progress_artifact

    def noted(artifact: Any, progress: float, **keywords: Any) -> Any:
        told.append(progress)
        return update(artifact, progress, **keywords)

    monkeypatch.setattr(prefect.artifacts, "update_progress_artifact", noted)
    monkeypatch.setattr(artifacts, "UPDATE_SECONDS", 0.0)
    state = convert(str(good_source), str(tmp_path / "out"), workers=1, return_state=True)
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=["ptbin-convert-progress"]))
    with get_client(sync_client=True) as client:
        (shown,) = [
            artifact
            for artifact in client.read_artifacts(artifact_filter=wanted)
            if artifact.flow_run_id == state.state_details.flow_run_id
        ]
    assert float(str(shown.data)) == 100.0
    assert told == sorted(told)
    assert told[-1] == 100.0


def test_a_flow_that_people_deploy_themselves_keeps_its_own_tags(
    good_source: Path, tmp_path: Path, server: Orchestrator, database: Database
) -> None:
    from prefect import tags

    with tags("team-a"):
        state = convert(str(good_source), str(tmp_path / "tagged"), return_state=True)
    assert state.message == "converted 6, up to date 0, rejected 0, failed 0"
    ((found,),) = database("select tags from flow_run where name like '%/tagged'")
    assert sorted(json.loads(found)) == ["ptbin", "team-a"]


def entry(path: str, novelty: str = "new") -> Outcome:
    return Outcome(
        path,
        "rejected",
        "corrupt_archive",
        "cut\nshort",
        source=f"/in/{path}",
        nbytes=10,
        novelty=novelty,
        since="2026-11-01T02",
    )


def test_a_message_stays_short_and_each_failure_on_its_line() -> None:
    lines = [failure_line(entry(f"{number}.pt")) for number in range(MAX_LISTED_FAILURES + 5)]
    message = state_message("rejected 15", lines, "https://models.example/report.html").splitlines()
    assert message[0] == "rejected 15"
    assert message[1] == "new: 0.pt: corrupt_archive: cut short"
    assert message[-2:] == ["and 5 more", "report: https://models.example/report.html"]
    assert len(failure_line(entry("x" * 4000))) == 300
    assert state_message("converted 3", [], "https://models.example/report.html") == "converted 3"
    assert failure_line(entry("b.pt", "old")) == "since 2026-11-01: b.pt: corrupt_archive: cut short"


def test_names_out_of_stores_are_no_markdown() -> None:
    tally = Tally("r", "/in", "/out")
    tally.entries.append(entry("a`|[x](http://evil)<b>.pt"))
    tally.counts["rejected"] = 1
    text = render_markdown(tally, tally.summary(1.0), "/out/report.html", None)
    row = next(line for line in text.splitlines() if "evil" in line)
    assert row.startswith("| ``a`\\|[x](http://evil)<b>.pt`` | **new** |")
    assert "The whole report" not in text


SERVED = (
    "s3://models=https://models.example s3://models/private=https://private.example/x/ /srv/w=http://files"
)


@pytest.mark.parametrize(
    ("uri", "options", "environment", "link"),
    [
        ("/srv/a b/r.html", {}, {}, "file:///srv/a%20b/r.html"),
        ("/srv/w/r.html", {}, {"PTBIN_SERVED": SERVED}, "http://files/r.html"),
        ("s3://models/r.html", {}, {"PTBIN_SERVED": SERVED}, "https://models.example/r.html"),
        ("s3://models/private/r.html", {}, {"PTBIN_SERVED": SERVED}, "https://private.example/x/r.html"),
        ("https://dav.example/r.html", {}, {}, "https://dav.example/r.html"),
        ("s3://b/_ptbin/r.html", {}, {}, "https://console.aws.amazon.com/s3/object/b?prefix=_ptbin%2Fr.html"),
        ("s3://b/r.html", {"endpoint_url": "http://127.0.0.1:9000"}, {}, None),
        ("s3://b/r.html", {}, {"AWS_ENDPOINT_URL": "http://minio:9000"}, None),
        ("gs://b/x/r.html", {}, {}, "https://console.cloud.google.com/storage/browser/_details/b/x/r.html"),
        ("sftp://host/r.html", {}, {}, None),
    ],
)
def test_a_report_has_the_link_that_opens_it(
    uri: str, options: dict[str, Any], environment: dict[str, str], link: str | None
) -> None:
    assert link_of(uri, options, environment) == link


def test_a_neighbour_with_a_longer_name_is_not_served() -> None:
    assert served_at("s3://models-2/r.html", SERVED) is None


def test_what_cannot_be_signed_has_no_link_and_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    options = {"client_kwargs": {"region_name": "eu-west-1"}}
    assert link_of("s3://bucket/out/r.html", options, {"PTBIN_PRESIGN": "1h"}) is None
    assert link_of("s3://bucket/out/r.html", options, {"PTBIN_PRESIGN": "a while"}) is None


def test_a_signed_link_opens_the_page_without_credentials(moto_s3: S3Endpoint) -> None:
    import urllib.request

    bucket = moto_s3.make_bucket()
    moto_s3.store().write_bytes(f"{bucket}/out/r.html", b"<html>")
    link = link_of(f"s3://{bucket}/out/r.html", moto_s3.storage_options, {"PTBIN_PRESIGN": "1h"})
    assert link is not None
    assert "X-Amz-Signature=" in link or "Signature=" in link
    with urllib.request.urlopen(link, timeout=30) as answer:  # noqa: S310 - moto's
        assert answer.read() == b"<html>"
