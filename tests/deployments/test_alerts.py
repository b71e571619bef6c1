"""Alerts: automations match the command line's runs on a shared server; new failures come first."""

from __future__ import annotations

import json
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.deployments.mailbox import Mailbox, MailServer
from tests.servers.endpoint import S3Endpoint
from tests.servers.fixtures import moto_s3
from tests.servers.prefect_home import prefect_template
from tests.servers.prefect_stack import ROOT, PrefectStack, wait_for
from tests.warm_python import stand_in

__all__ = ["moto_s3"]

pytestmark = [pytest.mark.starts_servers, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def mailbox() -> Iterator[Mailbox]:
    mailbox = Mailbox()
    yield mailbox
    mailbox.close()


@pytest.fixture(scope="module")
def post() -> Iterator[MailServer]:
    post = MailServer()
    yield post
    post.close()


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectStack]:
    """A server that a team shares; no worker, no deployment."""
    stack = PrefectStack(tmp_path_factory.mktemp("alerts"))
    (stack.folder / "home").mkdir()
    shutil.copyfile(prefect_template(tmp_path_factory), stack.folder / "home" / "prefect.db")
    try:
        stack.start_server()
        yield stack
    finally:
        stack.stop()


def run(stack: PrefectStack, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [stand_in(), "-P", *map(str, words)],
        env=stack.environment,
        cwd=stack.folder,
        capture_output=True,
        text=True,
        timeout=600,
    )


def automate(stack: PrefectStack, *words: str) -> subprocess.CompletedProcess[str]:
    return run(stack, ROOT / "deployments" / "automate.py", *words)


def test_a_failed_run_of_the_command_line_is_told_with_new_failures_first(
    stack: PrefectStack, mailbox: Mailbox, post: MailServer, tmp_path: Path
) -> None:
    mail = f"mailto://{post.address}?from=ptbin@models.example&to=you@models.example"
    blocks = f"""
from prefect.blocks.notifications import SlackWebhook
from prefect.blocks.webhook import Webhook
Webhook(method="POST", url="http://{mailbox.address}/hook", allow_private_urls=True).save("ptbin-alerts")
SlackWebhook(url="json://{mailbox.address}/slack").save("ptbin-alerts")
SlackWebhook(url="{mail}").save("ptbin-mail")
"""
    made = run(stack, "-c", blocks)
    assert made.returncode == 0, made.stderr
    nowhere = automate(stack, "notify-webhook", "--block", "webhook/nobody")
    assert (nowhere.returncode, "no block webhook/nobody" in nowhere.stderr) == (2, True)
    assert automate(stack, "notify-slack").returncode == 2  # it does not go through any block
    chosen = {"webhook": "webhook/ptbin-alerts", "slack": "slack-webhook/ptbin-alerts"}
    chosen["email"] = "slack-webhook/ptbin-mail"
    for name in (*chosen, "slack"):
        done = automate(stack, f"notify-{name}", "--block", chosen[name])
        assert done.returncode == 0, done.stderr
    assert len(stack.ask("/automations/filter")) == 3  # made anew, it takes the place of the first

    source, dest = tmp_path / "source", tmp_path / "dest"
    source.mkdir()
    for name in ("a", "b"):
        torch.save({"state_dict": {"w": torch.zeros(3)}}, source / f"{name}.pt")
    (source / "old.pt").write_bytes(b"PK\3\4" + b"\0" * 100)
    convert = ("-m", "ptbin", "convert", source, dest, "--quiet")
    assert run(stack, *convert).returncode == 1
    (source / "z-new.pt").write_bytes(b"PK\3\4" + b"\0" * 90)
    assert run(stack, *convert).returncode == 1
    ended = stack.runs()
    assert [flow_run["tags"] for flow_run in ended] == [["ptbin"], ["ptbin"]]
    wait_for(lambda: len(mailbox.at("/hook")) == 2, 90, "the webhook's calls")
    wait_for(lambda: len(mailbox.at("/slack")) == 2, 90, "the notifications")
    wait_for(lambda: len(post.letters) == 2, 90, "the e-mails")

    second = next(letter for letter in mailbox.at("/hook") if letter["flow_run"] == ended[1]["id"])
    assert second["state"] == "Failed"
    first_failure, second_failure, report = second["failures"]
    assert first_failure.startswith("new: z-new.pt: corrupt_archive: ")
    assert second_failure.startswith("since 20")
    assert ": old.pt: corrupt_archive: " in second_failure
    assert (
        report
        == f"report: file://{next((dest / '_ptbin' / 'runs').glob('*')).parent}/"
        + report.rpartition("/runs/")[2]
    )
    assert Path(report.removeprefix("report: file://")).is_file()
    assert second["counts"] == "converted 0, up to date 2, rejected 2, failed 0"
    assert second["url"].endswith(f"/runs/flow-run/{ended[1]['id']}")
    assert second["text"].splitlines()[1:] == [*second["failures"], second["counts"], second["url"]]
    slack = next(letter for letter in mailbox.at("/slack") if "z-new.pt" in letter["message"])
    assert slack["title"].startswith("ptbin convert Failed: ")
    assert slack["message"].lstrip().startswith("new: z-new.pt: corrupt_archive")
    letter = next(letter for letter in post.letters if "z-new.pt" in str(letter))
    assert (letter["to"], letter["from"]) == ("you@models.example", "ptbin@models.example")
    assert letter["subject"].startswith("ptbin convert Failed: ")
    text, page = (letter.get_body((kind,)) for kind in ("plain", "html"))
    assert text is not None
    assert page is not None
    lines = [line.strip() for line in text.get_content().splitlines() if line.strip()]
    assert lines == [*second["failures"], second["counts"], f"run: {second['url']}"]
    assert f'<a href="{second["url"]}">' in page.get_content()
    assert page.get_content().count("<br>") == 4, "a line each, where HTML is shown, too"


@pytest.mark.filterwarnings(
    "ignore:'imghdr' is deprecated:DeprecationWarning"
)  # apprise's e-mail looks for it
def test_an_e_mail_block_takes_the_template() -> None:
    import yaml
    from prefect.blocks.notifications import SendgridEmail
    from prefect.server.events.actions import SendNotification
    from pydantic import SecretStr

    document = yaml.safe_load((ROOT / "deployments/automations/notify-email.yaml").read_text())
    (action,) = document["actions"]
    action["block_document_id"] = "3f5619e2-80c1-459f-9c09-e7ce2c331965"
    assert "flow_run.state.message" in SendNotification.model_validate(action).body
    block = SendgridEmail(
        api_key=SecretStr("k"), sender_email="ptbin@models.example", to_emails=["you@models.example"]
    )
    assert "notify" in block.get_block_capabilities()


def test_what_arrives_is_converted_as_the_store_s_notification_says(
    stack: PrefectStack, moto_s3: S3Endpoint, tmp_path: Path
) -> None:
    """A notification of MinIO's, replayed: bucket to event, event to run, run to weights."""
    bucket = moto_s3.make_bucket()
    torch.save({"state_dict": {"w": torch.ones(3)}}, tmp_path / "new.pt")
    for name in ("new", "other"):
        moto_s3.store().write_bytes(f"{bucket}/runs/a b/{name}.pt", (tmp_path / "new.pt").read_bytes())
    dest = tmp_path / "weights"
    stack.environment |= {
        "PTBIN_SOURCE": f"s3://{bucket}/runs",
        "PTBIN_DEST": str(dest),
        "AWS_ENDPOINT_URL": moto_s3.url,
        "AWS_ACCESS_KEY_ID": moto_s3.key,
        "AWS_SECRET_ACCESS_KEY": moto_s3.secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "PTBIN_ARRIVALS_TOKEN": "pssst",
    }
    template = ROOT / "deployments" / "work-pools" / "process.json"
    stack.prefect(
        "work-pool", "create", "ptbin-process", "--type", "process", "--base-job-template", str(template)
    )
    stack.prefect("deploy", "--prefect-file", "deployments/prefect.yaml", "--name", "convert-arrivals")
    stack.start_worker()
    script = str(ROOT / "deployments" / "arrivals.py")
    words = [f"s3://{bucket}/runs", "--listen", "127.0.0.1:0", "--every", "1s"]
    stack.start_process(
        "arrivals", [stand_in(), "-P", script, *words, "--token-variable", "PTBIN_ARRIVALS_TOKEN"]
    )
    log = stack.folder / "arrivals.log"
    wait_for(lambda: log.read_text().startswith("listening on "), 90, "the listener's start")
    url = f"http://{log.read_text().split()[2]}/"
    entity = {"bucket": {"name": bucket}, "object": {"key": "runs%2Fa+b%2Fnew.pt"}}
    record = {"eventName": "s3:ObjectCreated:Put", "eventSource": "minio:s3", "s3": entity}
    body = json.dumps({"EventName": "s3:ObjectCreated:Put", "Records": [record]}).encode()

    def post(token: str) -> int:
        request = urllib.request.Request(url, body, {"Authorization": f"Bearer {token}"})
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
            return int(answer.status)

    with pytest.raises(urllib.error.HTTPError, match="401"):
        post("guessed")
    assert post("pssst") == 204
    manifest = dest / "a b" / "new.bin.manifest.json"
    wait_for(manifest.exists, 120, "the conversion of what arrived")
    assert not (dest / "a b" / "other.bin").exists()
    runs = [flow_run for flow_run in stack.runs() if flow_run["parameters"].get("files_from")]
    assert [flow_run["parameters"]["files_from"] for flow_run in runs] == [["a b/new.pt"]]
    assert stack.wait_for_end(runs[0]["id"])["message"].startswith("converted 1, ")
