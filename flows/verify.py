"""The verify flow: every manifest below DEST against what is stored there (`ptbin.runs.verifying`)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from prefect import get_run_logger

from flows.access import Running, RunSettings, join_run, running
from flows.artifacts import Artifacts, verification_rows
from flows.batches import plan_batches
from flows.forms import DEST, Text
from flows.notices import final_state, log_failures, state_message
from flows.options import VERIFY
from flows.parsing import refuse_secrets
from flows.prefect.orchestrator import await_server
from flows.run_flow import run_flow
from flows.stages import Stage, Stages, count_of
from ptbin.catalog import find_orphans
from ptbin.options import VerifyLevel
from ptbin.proof.signatures import verify_signatures
from ptbin.registries.verification import verify_records
from ptbin.runs.outcomes import Outcome
from ptbin.runs.record import new_run_id
from ptbin.runs.result import RunResult
from ptbin.runs.verifying import issues_of, list_manifests_below, orphan_issue, refuse_nothing_below, sum_up
from tasks.checking import verify_manifests
from tasks.live import Settled
from tasks.steps import step

__all__ = ["verify"]

ARTIFACT_KEY = "ptbin-verify"


@run_flow([DEST], VERIFY)
def verify(dest: Text, **asked: Any) -> Any:
    """Verify every manifest below `dest` at `level` (`checksum` or `load`), and what stands beside them.

    Statements of provenance, checksum lists of runs and registry records are held against the manifests;
    signatures are checked where `public_key` is given.

    Returns its `RunResult`; ends Failed (`RunFailedError`) unless every output is proven and has a manifest.
    """
    dest = os.fspath(dest)
    refuse_secrets(dest)
    settings = RunSettings.of(asked)
    public_key = asked["public_key"]
    with join_run(asked["run_id"] or new_run_id(), settings) as live:
        place = live.dest_at(dest)
        manifests, unread = step(live, "list manifests", lambda: list_manifests_below(place))
        orphans = step(live, "list orphans", lambda: list(find_orphans(place)))
        refuse_nothing_below(dest, manifests, orphans)
        with running(live, None, settings) as run:
            verdicts = _verify_all(run, manifests, asked["level"])
        issues = unread + [orphan_issue(uri) for uri in orphans]
        issues += [issue for verdict in verdicts for issue in issues_of(verdict)]
        digests = {uri: digest for verdict in verdicts for uri, digest in verdict.digests}
        found = step(live, "verify records", lambda: verify_records(place, digests))
        if public_key is not None:
            found += step(
                live,
                "verify signatures",
                lambda: verify_signatures(place, public_key, manifests, progress=live.moved),
            )
        issues += [issue.to_json() for issue in found]
        summary = sum_up(dest, verdicts, orphans, issues, time.monotonic() - live.began)
        live.summary.update(summary, run_id=live.run_id, task_runs=live.task_runs)
        message = summary["message"]
        if await_server(live.check):
            artifacts = Artifacts(ARTIFACT_KEY, get_run_logger())
            proven = sorted(verdict.path for verdict in verdicts if verdict.kind == "proven")
            artifacts.table(
                verification_rows(proven, issues),
                f"**{message}** in {summary['seconds']:.1f} s, below `{dest}`",
            )
            artifacts.end()
        failures = [f"{issue['reason']}: {issue['uri']}: {issue['detail']}" for issue in issues]
        log_failures(get_run_logger(), failures)
        return final_state(RunResult.of("verify", live.summary), state_message(message, failures))


def _verify_all(run: Running, manifests: Sequence[str], level: VerifyLevel) -> list[Outcome]:
    """One final outcome per manifest."""
    live = run.live
    final: list[Outcome] = []
    logger = get_run_logger()
    live.listener.planned(len(manifests), 0, 0)

    def settle(verdicts: Sequence[tuple[str, Outcome]]) -> None:
        for uri, outcome in verdicts:
            final.append(outcome)
            kind = "proven" if outcome.kind == "proven" else "failed"
            live.listener.settled(Settled(uri, kind, reason=outcome.reason, detail=outcome.detail))
            for issue in issues_of(outcome):
                logger.warning("%s: %s: %s", issue["reason"], issue["uri"], issue["detail"])

    stage = Stage(verify_manifests, "verify", {"level": level}, settle, count_of("manifests"))
    # Sizes stand in the manifests, which are not read twice: batches go by count alone.
    Stages(run, logger).carry_out(
        (stage, plan_batches(manifests, nbytes=lambda _: 0, workers=run.runner.width))
    )
    return final
