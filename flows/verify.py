"""The verify flow: holds every manifest below DEST against what is stored there (`ptbin.runs.verifying`)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from prefect import get_run_logger

from flows.access import Running, join_run, running
from flows.artifacts import Artifacts, verification_rows
from flows.batches import iter_batches
from flows.forms import DEST
from flows.notices import final_state
from flows.options import VERIFY, RunSettings
from flows.parsing import refuse_secrets
from flows.prefect.orchestrator import await_server
from flows.requests import Text
from flows.run_flow import run_flow
from flows.stages import Stage, Stages, count_of
from ptbin.options import VerifyLevel
from ptbin.runs.outcomes import Outcome
from ptbin.runs.result import RunResult
from ptbin.runs.run_ids import new_run_id
from ptbin.runs.verifying import issues_of, verify_below
from tasks.converting import verify_manifests
from tasks.steps import step


@run_flow([DEST], VERIFY)
def verify(dest: Text, **asked: Any) -> Any:
    """Verify every manifest below `dest` at `level` (`checksum` or `load`), and what else lies there.

    Statements of provenance, checksum lists of runs and registry records are held against the manifests;
    signatures are checked where `public_key` is given.

    Returns its `RunResult`; ends Failed (`RunFailedError`) unless every output is proven and has a manifest.
    """
    dest = os.fspath(dest)
    refuse_secrets(dest)
    settings = RunSettings.of(asked)
    verdicts: list[Outcome] = []
    with join_run(asked["run_id"] or new_run_id(), settings) as live:

        def verify_all(manifests: Sequence[str]) -> list[Outcome]:
            with running(live, None, settings) as run:
                _verify_all(run, manifests, asked["level"], verdicts)
            return verdicts

        summary = verify_below(
            live.sides.dest_at(dest),
            dest,
            verify_all,
            asked["public_key"],
            began=live.began,
            progress=live.moved,
            do=partial(step, live),
        )
        live.summary.update(summary, run_id=live.run_id, task_runs=live.task_runs)
        message, issues = summary["message"], summary["issues"]
        if await_server(live.check):
            artifacts = Artifacts("ptbin-verify", get_run_logger())
            artifacts.table(
                verification_rows((verdict.path for verdict in verdicts if verdict.kind == "proven"), issues),
                f"**{message}** in {summary['seconds']:.1f} s, below `{dest}`",
            )
            artifacts.end()
        failures = [f"{issue['reason']}: {issue['uri']}: {issue['detail']}" for issue in issues]
        return final_state(RunResult.of("verify", live.summary), message, failures)


def _verify_all(run: Running, manifests: Sequence[str], level: VerifyLevel, final: list[Outcome]) -> None:
    """Add one final outcome per manifest."""
    logger, listener = get_run_logger(), run.live.listener
    listener.planned(len(manifests), 0, 0)

    def settle(verdicts: Sequence[tuple[str, Outcome]]) -> None:
        for uri, outcome in verdicts:
            final.append(outcome)
            listener.settled(
                replace(outcome, source=uri, kind="proven" if outcome.kind == "proven" else "failed")
            )
            for issue in issues_of(outcome):
                logger.warning("%s: %s: %s", issue["reason"], issue["uri"], issue["detail"])

    stage = Stage(verify_manifests, "verify", {"level": level}, settle, count_of("manifests"))
    # Sizes stand in the manifests, which are not read twice: batches go by count alone.
    batches = iter_batches(manifests, len(manifests), 0, nbytes=lambda _: 0, workers=run.runner.width)
    Stages(run, logger).carry_out((stage, batches))
