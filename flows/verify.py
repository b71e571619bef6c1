"""The verify flow: every manifest below DEST is held against what is stored there.

What is read is what the manifests vouch for, plus one listing for outputs that none of them does. One
broken output never hides another. Nothing is written but a note in the manifest of a damaged output, so that
the next conversion makes it anew.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed
from prefect.task_runners import ThreadPoolTaskRunner
from pydantic import Field

from flows.access import Running, RunSettings, join_run, running
from flows.artifacts import Artifacts, verification_rows
from flows.batches import plan_batches
from flows.fanout import Work, fan_out, unexamined
from flows.notices import log_failures, state_message
from flows.parameters import described
from flows.prefect.orchestrator import await_server
from flows.run_record import new_run_id
from flows.runners import RunnerName
from flows.wishes import MAX_WORKERS, refuse_secrets
from ptbin.errors import UsageError
from ptbin.options import VerifyLevel
from tasks.checking import check_records, check_signatures, verify_manifests
from tasks.listing import list_manifests, list_orphans
from tasks.live import Settled
from tasks.outcomes import ManifestVerdict, one_line
from tasks.retrying import RETRIES, retry_delay

__all__ = ["orphan_issue", "verify"]

ARTIFACT_KEY = "ptbin-verify"


@flow(
    name="verify",
    flow_run_name="{dest}",
    task_runner=ThreadPoolTaskRunner(max_workers=MAX_WORKERS),  # type: ignore[arg-type]
    persist_result=False,
)
@described
def verify(
    dest: str,
    *,
    level: VerifyLevel = "checksum",
    public_key: str | None = None,
    runner: RunnerName = "threads",
    runner_address: str | None = None,
    workers: Annotated[int, Field(ge=1, le=MAX_WORKERS)] | None = None,
    source_options: str | None = None,
    dest_options: str | None = None,
    run_id: str | None = None,
) -> State[Any]:
    """Verify every manifest below `dest` at `level` (`checksum` or `load`), and what stands beside them.

    Statements of provenance, checksum lists of runs and registry records are held against the manifests;
    signatures are checked where `public_key` is given.

    Ends Completed where every output is proven and has a manifest, else Failed with the counts.
    """
    refuse_secrets(dest)
    with join_run(run_id or new_run_id(), source_options, dest_options) as live:
        manifests, unread = list_manifests(live.run_id, dest)
        orphans = list_orphans(live.run_id, dest)
        if not manifests and not orphans:
            raise UsageError(f"nothing to verify below DEST, neither manifests nor outputs: {dest}")
        settings = RunSettings(
            runner, runner_address, workers, source_options=source_options, dest_options=dest_options
        )
        with running(live, None, settings) as run:
            verdicts, task_runs = _verify_all(run, manifests, level)
        issues = unread + [orphan_issue(uri) for uri in orphans]
        issues += [issue for verdict in verdicts for issue in verdict.issues]
        digests = {uri: digest for verdict in verdicts for uri, digest in verdict.digests}
        issues += check_records(live.run_id, dest, unexamined(digests))
        if public_key is not None:
            issues += check_signatures(live.run_id, dest, public_key, unexamined(manifests))
        proven = sorted(verdict.manifest_uri for verdict in verdicts if not verdict.issues)
        message = (
            f"proven {len(proven)}, failed {len(manifests) - len(proven)}, "
            f"outputs without a manifest {len(orphans)}"
        )
        seconds = time.monotonic() - live.began
        live.summary.update(
            dest=dest,
            manifests=len(manifests),
            proven=len(proven),
            failed=len(manifests) - len(proven),
            orphans=len(orphans),
            seconds=round(seconds, 3),
            issues=issues,
            message=message,
            succeeded=not issues,
            task_runs=task_runs + 3 + (public_key is not None),
        )
        if await_server(live.check):
            artifacts = Artifacts(ARTIFACT_KEY, get_run_logger())
            artifacts.table(
                verification_rows(proven, issues), f"**{message}** in {seconds:.1f} s, below `{dest}`"
            )
            artifacts.end()
        failures = [f"{issue['reason']}: {issue['uri']}: {issue['detail']}" for issue in issues]
        log_failures(get_run_logger(), failures)
        return (Failed if issues else Completed)(message=state_message(message, failures))


def orphan_issue(uri: str) -> dict[str, Any]:
    """An output that nothing vouches for: the run that wrote it did not finish with it."""
    detail = "no manifest beside it: never proven, a rerun of the conversion replaces it"
    return {"reason": "no_manifest", "uri": uri, "detail": detail}


def _verify_all(
    run: Running, manifests: Sequence[str], level: VerifyLevel
) -> tuple[list[ManifestVerdict], int]:
    """One final verdict per manifest, and the number of task runs that took."""
    live = run.live
    final: list[ManifestVerdict] = []
    logger = get_run_logger()
    live.listener.planned(len(manifests), 0, 0)

    def check(uris: Sequence[str], retry: int = 0) -> Work:
        label = f"{len(uris)} manifests" + (f", retry {retry}" if retry else "")

        def then(state: State[Any]) -> Iterable[Work]:
            if state.is_completed():
                verdicts: list[ManifestVerdict] = state.result()
            else:
                detail = one_line(f"the task run ended {state.name}: {state.message}")
                verdicts = [
                    ManifestVerdict(uri, ({"reason": "internal_error", "uri": uri, "detail": detail},))
                    for uri in uris
                ]
            again = [verdict.manifest_uri for verdict in verdicts if verdict.transient and retry < RETRIES]
            for verdict in verdicts:
                if verdict.manifest_uri in again:
                    continue
                final.append(verdict)
                first = verdict.issues[0] if verdict.issues else {"reason": "", "detail": ""}
                live.listener.settled(
                    Settled(
                        verdict.manifest_uri,
                        "failed" if verdict.issues else "proven",
                        reason=first["reason"],
                        detail=first["detail"],
                    )
                )
                for issue in verdict.issues:
                    logger.warning("%s: %s: %s", issue["reason"], issue["uri"], issue["detail"])
            if again:
                yield check(again, retry + 1)

        return Work(
            lambda: run.runner.submit(
                verify_manifests,
                ticket=run.ticket,
                label=label,
                manifest_uris=uris,
                level=level,
            ),
            then,
            delay=retry_delay(retry) if retry else 0.0,
        )

    # Sizes stand in the manifests, which are not read twice: batches go by count alone.
    batches = plan_batches(manifests, nbytes=lambda _: 0, workers=run.runner.width)
    task_runs = fan_out(map(check, batches), width=run.runner.width, stop=run.stop, check=live.check)
    return final, task_runs
