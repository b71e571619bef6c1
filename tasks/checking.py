"""The tasks of the verify flow: hold manifests against what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptbin.options import VerifyLevel
from ptbin.proof.signatures import verify_signatures
from ptbin.registries.verification import verify_records
from ptbin.runs.outcomes import Outcome
from ptbin.runs.verifying import verify_manifest
from tasks.batches import batch_task, single_task
from tasks.live import LiveRun, find_live_run

__all__ = ["check_records", "check_signatures", "verify_manifests"]


@batch_task("verify manifests")
def verify_manifests(live: LiveRun, uri: str, level: VerifyLevel) -> Outcome:
    """As `ptbin.runs.verifying.verify_manifest`."""
    return verify_manifest(uri, level, live.dest_options, live.moved)


@single_task("verify records")
def check_records(run_id: str, dest: str, digests: Mapping[str, tuple[str, str]]) -> list[dict[str, str]]:
    """Issues of checksum lists and registry records below `dest`."""
    live = find_live_run(run_id)
    return [issue.to_json() for issue in verify_records(dest, digests, storage_options=live.dest_options)]


@single_task("verify signatures")
def check_signatures(
    run_id: str, dest: str, public_key: str, manifests: Sequence[str]
) -> list[dict[str, str]]:
    """Issues of the signatures below `dest`."""
    live = find_live_run(run_id)
    found = verify_signatures(live.dest_at(dest), public_key, manifests, progress=live.moved)
    return [issue.to_json() for issue in found]
