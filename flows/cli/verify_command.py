"""`ptbin verify`: one output by the engine directly, or everything below a place through the Prefect flow."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flows.cli.command import Shared, command
from flows.cli.progress import Problems, showing_progress
from flows.cli.started import began
from flows.cli.summary import verification_lines
from flows.options import VERIFY
from flows.parsing import refuse_secrets
from ptbin.errors import UsageError

if TYPE_CHECKING:
    from ptbin.stores import Place

JSON_KEYS = ("dest", "manifests", "proven", "failed", "orphans", "seconds", "issues")

EPILOG = """\b
Examples:
  ptbin verify last.bin
  ptbin verify weights/
  ptbin verify s3://models/weights --workers 4 --json

Reads back every byte that the manifests vouch for. DEST is one output, one manifest, or a directory or
prefix, where outputs without a manifest are reported too, and where checksum lists, registry records and
statements of provenance must say what the manifests say. A registry's URI (mlflow+http://...) stands for the
place of its files. Damage is noted in the output's manifest: the next convert or sync makes that output anew.

Exit status: 0 all proven; 1 something is not what its manifest says;
2 the call was wrong; 130 interrupted."""


@command("verify", ["dest"], VERIFY, EPILOG)
def verify_command(dest: str, asked: dict[str, Any], shared: Shared) -> int:
    """Check every manifest at or below DEST against what is stored."""
    from ptbin.registries import is_registry_uri, open_registry

    # A repository of a Hub is a place like any other: what was published is read back from there.
    if is_registry_uri(dest) and not ("/" in dest.removeprefix("hf://") and dest.startswith("hf://")):
        dest = open_registry(dest, None, shared.dest_options).home()

    with showing_progress(shared) as listener:
        listener.leaves_them = not shared.quiet and not shared.as_json
        place = shared.sides.dest_at(dest)
        if place.is_directory():
            from flows.cli.on_prefect import run_flow

            refuse_secrets(dest)
            _refuse_empty(place, dest)
            summary = run_flow("verify", shared, listener, dest=dest, **asked)
        else:
            summary = _verify_one(dest, place, asked, listener)
    shared.answer(lambda: {key: summary[key] for key in JSON_KEYS}, verification_lines(summary))
    return 0 if not summary["issues"] else 1


def _refuse_empty(place: Place, dest: str) -> None:
    from ptbin import catalog

    for find in (catalog.find_manifests, catalog.find_orphans):
        if next(iter(find(place)), None) is not None:
            return
    raise UsageError(f"nothing to verify below DEST, neither manifests nor outputs: {dest}")


def _manifest_of(place: Place) -> Place:
    """The manifest of DEST: itself, next to it, or that of the output that `--split` made it a part of.

    Raises:
        NotFoundInStoreError: neither an output nor a manifest is there, which is the caller's mistake and not
            an issue. Of shards and split outputs only the manifest is there.
    """
    from ptbin.catalog.finding import split_manifest
    from ptbin.errors import NotFoundInStoreError
    from ptbin.manifests.manifest import MANIFEST_SUFFIX

    own = place if place.name.endswith(MANIFEST_SUFFIX) else place.beside(MANIFEST_SUFFIX)
    try:
        own.stat()
    except NotFoundInStoreError:
        place.stat()
        found = split_manifest(place.parent, place.name)
        return own if found is None else place.parent / found
    return own


def _verify_one(dest: str, place: Place, asked: dict[str, Any], listener: Problems) -> dict[str, Any]:
    from ptbin.runs.outcomes import Outcome
    from ptbin.runs.verifying import issues_of, sum_up, verify_manifest
    from ptbin.stores import public_uri

    listener.planned(1, 0, 0)
    manifest = _manifest_of(place)
    verdict = verify_manifest(manifest, asked["level"], listener.moved)
    issues = list(issues_of(verdict))
    if (public_key := asked["public_key"]) is not None:
        from ptbin.proof.signatures import verify_signatures

        signed = verify_signatures(place, public_key, [manifest.uri], progress=listener.moved)
        issues += [issue.to_json() for issue in signed]
    for issue in issues:
        listener.settled(
            Outcome(issue["uri"], "failed", issue["reason"], issue["detail"], source=issue["uri"])
        )
    if issues:
        verdict = replace(verdict, kind="failed")
    return sum_up(public_uri(dest), [verdict], [], issues, time.monotonic() - began())
