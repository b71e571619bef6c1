"""The tasks of the verify flow: hold manifests against what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ptbin.options import VerifyLevel
from ptbin.proof.signatures import verify_signatures
from ptbin.proof.verification import verify_outputs
from ptbin.registries.verification import verify_records
from tasks.batches import batch_task, single_task
from tasks.live import LiveRun, find_live_run
from tasks.outcomes import Outcome

__all__ = ["check_records", "check_signatures", "verify_manifests"]


@batch_task("verify manifests")
def verify_manifests(live: LiveRun, uri: str, level: VerifyLevel) -> Outcome:
    """Read back what a manifest vouches for: `proven`, or `failed` with its issues."""
    issues, digests = verify_outputs(
        uri, level=level, storage_options=live.dest_options, progress=live.moved, note=True
    )
    first = issues[0] if issues else None
    return Outcome(
        uri,
        "proven" if first is None else "failed",
        first.reason if first is not None else "",
        first.detail if first is not None else "",
        issues=tuple(issue.to_json() for issue in issues),
        digests=tuple(digests.items()),
    )


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
