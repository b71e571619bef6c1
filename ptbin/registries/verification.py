"""What a destination says of itself besides its manifests: checksum lists of runs, records of registries.

Each is held against the manifests. Returns issues; raises only where it could not look.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ptbin.catalog.finding import OWN_FOLDER
from ptbin.errors import LimitExceededError, NotFoundInStoreError, VerificationError
from ptbin.manifests.checksums import CHECKSUM_LIST
from ptbin.proof.verification import Issue
from ptbin.registries.record import RECORD, ModelRecord
from ptbin.stores import Place, WatchQuietly

__all__ = ["verify_records"]


MAX_NBYTES = 256 << 20
_LINE = re.compile(r"(\\?)([0-9a-f]{64}) [ *](.+)")
_ESCAPED = re.compile(r"\\(.)")


def verify_records(dest: Place, digests: Mapping[str, tuple[str, str]]) -> list[Issue]:
    """Hold the checksum lists and registry records below DEST against what its manifests say.

    Args:
        digests: URI of each output that a manifest vouches for, its hexadecimal SHA-256, and the id of the
            run that stored it.

    A list speaks of what its own run stored: what a later one wrote over does not contradict it, nor does
    what is not there any more.
    """
    root = dest.file
    issues: list[Issue] = []
    records = []
    for item in root.iter_objects(WatchQuietly()):
        parts = item.path.split("/")
        if parts[0] == OWN_FOLDER and parts[-1] == CHECKSUM_LIST:
            sums: dict[str, str] = {}
            place = root / item.path
            issues += _read_list(place, sums)
            for name, digest in sums.items():
                found, run_id = digests.get((root / name).uri, (digest, ""))
                if found != digest and run_id == parts[-2]:
                    detail = f"{name}: the list says {digest}, its manifest {found}"
                    issues.append(Issue("checksum_list_mismatch", place.uri, detail))
        elif parts[-1] == RECORD:
            records.append(root / item.path)
    for record in records:
        issues += _check_record(record)
    return issues


def _read_list(place: Place, sums: dict[str, str]) -> list[Issue]:
    uri = place.uri
    try:
        text = place.read_bytes(limit=MAX_NBYTES).decode()
    except (NotFoundInStoreError, LimitExceededError, UnicodeDecodeError) as error:
        return [Issue("checksum_list_mismatch", uri, f"not to be read: {error}")]
    wrong = 0
    # Not `splitlines`: a name may hold other characters that it takes for the end of a line.
    for line in text.removesuffix("\n").split("\n"):
        if line.startswith(
            "#"
        ):  # a tensor's digest (`manifests.checksums`): for people, as the manifest has it
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            wrong += 1
            continue
        name = _ESCAPED.sub(_unescape, match[3]) if match[1] else match[3]
        sums[name] = match[2]
    return (
        [Issue("checksum_list_mismatch", uri, f"{wrong} lines are not of a checksum list")] if wrong else []
    )


def _unescape(match: re.Match[str]) -> str:
    return {"n": "\n", "r": "\r"}.get(match[1], match[1])


def _check_record(place: Place) -> list[Issue]:
    """Every version that is registered is there, finished, with its manifests; aliases lead to one."""
    uri = place.uri
    try:
        record = ModelRecord.from_bytes(place.read_bytes(limit=MAX_NBYTES), uri)
    except (VerificationError, LimitExceededError) as error:
        return [Issue("bad_registry", uri, str(error))]
    issues = []
    known = set()
    for row in record.versions:
        known.add(row.version.version)
        folder = place.parent if row.path == "." else place.parent / row.path
        for name in row.manifests:
            try:
                (folder / name).stat()
            except NotFoundInStoreError:
                issues.append(Issue("bad_registry", uri, f"version {row.version.version} has no {name}"))
    issues += [
        Issue("bad_registry", uri, f"alias {alias} leads to version {target}, which is not there")
        for alias, target in record.aliases.items()
        if target not in known
    ]
    return issues
