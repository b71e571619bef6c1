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
from flows.fanout import quote
from flows.forms import DEST, Text
from flows.notices import final_state, log_failures, state_message
from flows.options import VERIFY
from flows.prefect.orchestrator import await_server
from flows.run_flow import run_flow
from flows.stages import Stage, Stages, count_of
from flows.wishes import refuse_secrets
from ptbin.options import VerifyLevel
from ptbin.runs.outcomes import Outcome
from ptbin.runs.record import new_run_id
from ptbin.runs.result import RunResult
from ptbin.runs.verifying import issues_of, orphan_issue, refuse_nothing_below, sum_up
from tasks.checking import check_records, check_signatures, verify_manifests
from tasks.listing import list_manifests, list_orphans
from tasks.live import Settled

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
        manifests, unread = list_manifests(live.run_id, dest)
        orphans = list_orphans(live.run_id, dest)
        refuse_nothing_below(dest, manifests, orphans)
        with running(live, None, settings) as run:
            verdicts, task_runs = _verify_all(run, manifests, asked["level"])
        issues = unread + [orphan_issue(uri) for uri in orphans]
        issues += [issue for verdict in verdicts for issue in issues_of(verdict)]
        digests = {uri: digest for verdict in verdicts for uri, digest in verdict.digests}
        issues += check_records(live.run_id, dest, quote(digests))
        if public_key is not None:
            issues += check_signatures(live.run_id, dest, public_key, quote(manifests))
        summary = sum_up(dest, verdicts, orphans, issues, time.monotonic() - live.began)
        task_runs += 3 + (public_key is not None)
        live.summary.update(summary, run_id=live.run_id, task_runs=task_runs)
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


def _verify_all(run: Running, manifests: Sequence[str], level: VerifyLevel) -> tuple[list[Outcome], int]:
    """One final outcome per manifest, and the number of task runs that took."""
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
    stages = Stages(run, logger)
    # Sizes stand in the manifests, which are not read twice: batches go by count alone.
    stages.carry_out((stage, plan_batches(manifests, nbytes=lambda _: 0, workers=run.runner.width)))
    return final, stages.task_runs
