"""Every manifest below DEST against what is stored there: the verify flow, `verify_directory`, one output.

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
from ptbin.runs.result import RunResult
from ptbin.runs.run_ids import check_run_id, new_run_id
from ptbin.stores import Place, Sides, Where
from ptbin.stores.place import apart
from ptbin.values.names import shown_path

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
    dest, dest_options = apart(dest, dest_options)
    sides = Sides(dest_options=dest_options)

    def verify(uri: str) -> Outcome:
        try:
            return verify_manifest(sides.dest_at(uri), level, progress)
        except Exception as error:  # noqa: BLE001 - what is wrong with one must not stop the others
            return outcome_of_error(uri, error)

    def verify_all(manifests: Sequence[str]) -> list[Outcome]:
        threads = workers or max(available_cores(), 2)
        with ThreadPoolExecutor(threads, thread_name_prefix="ptbin-verify") as pool:
            return list(pool.map(verify, manifests))

    began = time.monotonic()
    place = sides.dest_at(dest)
    summary = verify_below(place, dest, verify_all, public_key, began=began, progress=progress)
    return RunResult.of("verify", {"run_id": run_id, **summary})


def verify_below(
    place: Place,
    dest: str,
    verify_all: Callable[[Sequence[str]], Sequence[Outcome]],
    public_key: str | None,
    *,
    began: float,
    progress: Callable[[int], None] | None,
    do: Callable[[str, Callable[[], Any]], Any] = lambda _, look: look(),
) -> dict[str, Any]:
    """The summary of a verification; `verify_all` works on the manifests, in threads or as task runs.

    Args:
        dest: how `place` is called.
        verify_all: manifests to an outcome for each, as `verify_manifest` gives it.
        do: has a step done that has a name; a flow makes a task run of it.

    Raises:
        UsageError: there is nothing to verify below `dest`. StorageError: the store failed.
    """
    manifests, issues = do("list manifests", lambda: _list_manifests(place))
    orphans = do("list orphans", lambda: list(find_orphans(place)))
    if not manifests and not orphans:
        raise UsageError(f"nothing to verify below DEST, neither manifests nor outputs: {dest}")
    verdicts = verify_all(manifests)
    issues += [_orphan_issue(uri) for uri in orphans]
    issues += [issue for verdict in verdicts for issue in issues_of(verdict)]
    digests = {uri: digest for verdict in verdicts for uri, digest in verdict.digests}
    found = do("verify records", lambda: verify_records(place, digests))
    if public_key is not None:
        found += do(
            "verify signatures",
            lambda: verify_signatures(place, public_key, manifests, progress=progress),
        )
    issues += [issue.to_json() for issue in found]
    return sum_up(dest, verdicts, orphans, issues, time.monotonic() - began)


def _list_manifests(dest: Place) -> tuple[list[str], list[Issue]]:
    """The URI of every manifest below `dest`, and an issue for each folder that cannot be read."""
    entries = DestEntries()
    found = list(find_manifests(dest, watch=entries))
    issues = [
        {"reason": error.reason, "uri": shown_path((dest / path).uri), "detail": one_line(str(error))}
        for path, error in entries.problems
    ]
    return found, issues


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


def _orphan_issue(uri: str) -> Issue:
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
