"""Every manifest below DEST against what is stored there: what the verify flow and `verify_directory` share.

What is read is what the manifests vouch for, plus one listing for outputs that none of them does. One broken
output never hides another. Nothing is written but a note in the manifest of a damaged output, so that the
next conversion makes it anew.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ptbin.catalog.finding import DestEntries, find_manifests, find_orphans
from ptbin.cores import available_cores
from ptbin.errors import UsageError
from ptbin.options import VerifyLevel
from ptbin.proof.signatures import verify_signatures
from ptbin.proof.verification import verify_outputs
from ptbin.registries.verification import verify_records
from ptbin.runs.outcomes import Outcome, one_line, outcome_of_error
from ptbin.runs.record import check_run_id, new_run_id
from ptbin.runs.result import RunResult
from ptbin.stores import Place, Sides, Where
from ptbin.stores.place import apart
from ptbin.values.names import shown_path

__all__ = [
    "issues_of",
    "list_manifests_below",
    "orphan_issue",
    "refuse_nothing_below",
    "sum_up",
    "verify_directory",
    "verify_manifest",
]

Issue = dict[str, Any]


def verify_directory(
    dest: Where,
    *,
    level: VerifyLevel = "checksum",
    public_key: str | None = None,
    workers: int | None = None,
    run_id: str | None = None,
    dest_options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> RunResult:
    """Verify every manifest below `dest`, as `ptbin verify` does, without Prefect.

    `problems` of the result are all that was found wrong: outputs that are not what their manifests say,
    outputs without one, checksum lists and registry records that say something else, and, with `public_key`
    (a PEM file), signatures.

    Args:
        workers: manifests worked on at once; left out, one a core.
        progress: called with the bytes read since its last call, from several threads; it may raise.

    Raises:
        UsageError: there is nothing to verify below `dest`. StorageError: the store failed.
    """
    check_run_id(run_id := run_id or new_run_id())
    began = time.monotonic()
    dest, dest_options = apart(dest, dest_options)
    sides = Sides(dest_options=dest_options)
    place = sides.dest_at(dest)
    manifests, issues = list_manifests_below(place)
    orphans = list(find_orphans(place))
    refuse_nothing_below(dest, manifests, orphans)

    def verify(uri: str) -> Outcome:
        try:
            return verify_manifest(sides.dest_at(uri), level, progress)
        except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
            return outcome_of_error(uri, error)

    with ThreadPoolExecutor(workers or max(available_cores(), 2), thread_name_prefix="ptbin-verify") as pool:
        verdicts = list(pool.map(verify, manifests))
    issues += [orphan_issue(uri) for uri in orphans]
    issues += [issue for verdict in verdicts for issue in issues_of(verdict)]
    digests = {uri: digest for verdict in verdicts for uri, digest in verdict.digests}
    issues += [issue.to_json() for issue in verify_records(place, digests)]
    if public_key is not None:
        found = verify_signatures(place, public_key, manifests, progress=progress)
        issues += [issue.to_json() for issue in found]
    seconds = time.monotonic() - began
    summary = sum_up(dest, verdicts, orphans, issues, seconds)
    return RunResult.of("verify", {"run_id": run_id, **summary})


def list_manifests_below(dest: Place) -> tuple[list[str], list[Issue]]:
    """The URI of every manifest below `dest`, and an issue for each folder that cannot be read."""
    entries = DestEntries()
    found = list(find_manifests(dest, watch=entries))
    issues = [
        {"reason": error.reason, "uri": shown_path((dest / path).uri), "detail": one_line(str(error))}
        for path, error in entries.problems
    ]
    return found, issues


def refuse_nothing_below(dest: str, manifests: Sequence[str], orphans: Sequence[str]) -> None:
    """Raises UsageError where there is nothing to verify."""
    if not manifests and not orphans:
        raise UsageError(f"nothing to verify below DEST, neither manifests nor outputs: {dest}")


def verify_manifest(place: Place, level: VerifyLevel, progress: Callable[[int], None] | None) -> Outcome:
    """Read back what a manifest vouches for: `proven`, or `failed` with its issues."""
    issues, digests = verify_outputs(place, level=level, progress=progress, note=True)
    first = issues[0] if issues else None
    return Outcome(
        place.uri,
        "proven" if first is None else "failed",
        first.reason if first is not None else "",
        first.detail if first is not None else "",
        issues=tuple(issue.to_json() for issue in issues),
        digests=tuple(digests.items()),
    )


def orphan_issue(uri: str) -> Issue:
    """An output that nothing vouches for: the run that wrote it did not finish with it."""
    detail = "no manifest next to it: it was never verified; a rerun of the conversion replaces it"
    return {"reason": "no_manifest", "uri": uri, "detail": detail}


def issues_of(outcome: Outcome) -> Sequence[Issue]:
    """What was found wrong; none where the outputs of a manifest are proven."""
    if outcome.issues or outcome.kind == "proven":
        return outcome.issues
    detail = outcome.detail or "the run was stopped before it came to this manifest"
    return [{"reason": outcome.reason or "run_stopped", "uri": outcome.path, "detail": detail}]


def sum_up(
    dest: str, verdicts: Sequence[Outcome], orphans: Sequence[str], issues: Sequence[Issue], seconds: float
) -> dict[str, Any]:
    """The summary of a verification."""
    proven = sum(verdict.kind == "proven" for verdict in verdicts)
    failed = len(verdicts) - proven
    return {
        "dest": dest,
        "manifests": len(verdicts),
        "proven": proven,
        "failed": failed,
        "orphans": len(orphans),
        "seconds": round(seconds, 3),
        "issues": list(issues),
        "message": f"proven {proven}, failed {failed}, outputs without a manifest {len(orphans)}",
        "succeeded": not issues,
    }
