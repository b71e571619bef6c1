"""Verification at any later time: a stored manifest against what is stored next to it.

Needs nothing but the manifest and the store: files by size and SHA-256, tensors by theirs. A file whose
SHA-256 was not asked for (`--file-digest none`) is checked by those of its tensors, of the bytes between
them, and by its CRC-32. Finds a single flipped bit, a missing or resized file, and says which tensors are
hit. Returns issues; raises only where it could not look. Writes nothing, unless it is to note damage in the
manifest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ptbin.errors import LimitExceededError, NotFoundInStoreError, StorageError, VerificationError
from ptbin.manifests.damage import damaged_file, note_damage
from ptbin.manifests.manifest import MANIFEST_SUFFIX, hex_crc32, parse_manifest, rows_by_file
from ptbin.manifests.provenance import STATEMENT_SUFFIX, statement_of
from ptbin.proof.digests import digest_file
from ptbin.proof.output import stored_tensor
from ptbin.proof.serial import Serial
from ptbin.stores import ObjectStat, Place, RangeReader, place_of
from ptbin.stores.place import Where

MAX_STATEMENT_NBYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Issue:
    """Something that is not as it should be; `reason` is one of `missing_output`, `size_mismatch`,
    `checksum_mismatch`, `bad_manifest`, `load_failed`, `no_manifest`, `provenance_missing`,
    `provenance_mismatch`, `checksum_list_mismatch`, `bad_registry`, `bad_signature`, `not_signed`.
    """

    reason: str
    uri: str
    detail: str

    def to_json(self) -> dict[str, str]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> Issue:
        return cls(**data)


def verify(
    manifest_uri: Where,
    *,
    level: str = "checksum",
    storage_options: Mapping[str, Any] | None = None,
    source_options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    note: bool = False,
) -> list[Issue]:
    """Check one manifest; an empty list means that everything it says is true.

    Args:
        level: `checksum` reads every byte; `load` opens the output with torch as well; `none` looks at
            sizes only.
        note: note damaged files in the manifest, so that the next conversion makes them anew.

    Raises:
        StorageError: the store failed in another way than by not having the file.
    """
    del source_options
    return verify_outputs(
        manifest_uri, level=level, storage_options=storage_options, progress=progress, note=note
    )[0]


def verify_outputs(
    manifest_uri: Where,
    *,
    level: str = "checksum",
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
    note: bool = False,
) -> tuple[list[Issue], dict[str, tuple[str, str]]]:
    """As `verify`, and by the URI of each output the SHA-256 and the run that the manifest states."""
    place = place_of(manifest_uri, storage_options)
    uri = place.uri
    try:
        manifest = parse_manifest(place.read_bytes(), uri)
        _check_rows(manifest, uri)
        rows_of = rows_by_file(manifest["tensors"])
    except NotFoundInStoreError:
        return [Issue("no_manifest", uri, "there is no manifest")], {}
    except VerificationError as error:
        return [Issue("bad_manifest", uri, str(error))], {}
    folder, output_place = place.parent, place.without(MANIFEST_SUFFIX)
    issues: list[Issue] = []
    damaged: dict[str, Any] = {}
    for output in manifest["outputs"]:
        mine = rows_of.get(output["path"], [])
        found, file = _verify_output(folder / output["path"], output, mine, level, progress)
        issues.extend(found)
        if file is not None:
            damaged[output["path"]] = file
    if note and damaged:
        note_damage(place, damaged)
    if "provenance" in manifest:
        issues.extend(_verify_statement(output_place, manifest))
    if level == "load" and not issues and "restore" not in manifest["options"]:
        issues.extend(_verify_by_loading(output_place, manifest))
    stated = {
        (folder / output["path"]).uri: (output["sha256"], str(manifest.get("run_id", "")))
        for output in manifest["outputs"]
        if isinstance(output.get("sha256"), str)
    }
    return issues, stated


def _check_rows(manifest: Mapping[str, Any], uri: str) -> None:
    """Raises VerificationError where the manifest could vouch for less than it seems to."""
    sizes = {output["path"]: output["size"] for output in manifest["outputs"]}
    # of a restored module ptbin may not be able to say where in the file each tensor lies
    if not sizes or not (manifest["tensors"] or "restore" in manifest["options"]):
        raise VerificationError(f"{uri}: the manifest lists no output or no tensor")
    for output in manifest["outputs"]:
        if not any(isinstance(output.get(digest), str) for digest in ("sha256", "crc32")):
            raise VerificationError(f"{uri}: the manifest holds no digest of {output['path']!r}")
    for row in manifest["tensors"]:
        if not isinstance(row, dict) or row.get("file") not in sizes:
            raise VerificationError(f"{uri}: the manifest lists a tensor that is in none of its outputs")
        stored_tensor(row, sizes[row["file"]])
    if "accounting" in manifest:
        _check_accounting(manifest, uri)


def _check_accounting(manifest: Mapping[str, Any], uri: str) -> None:
    """Raises VerificationError where the sums of the accounting are not those of the manifest's own rows."""
    stated = manifest["accounting"]
    try:
        taken = sum(int(row.get("source_nbytes", row["nbytes"])) for row in manifest["tensors"])
        by_role: dict[str, int] = {}
        for item in manifest["left_out"]:
            if item["nbytes"]:
                by_role[item["role"]] = by_role.get(item["role"], 0) + item["nbytes"]
        whole = taken + sum(by_role.values())
        found = {"source_tensor_bytes": whole, "taken_bytes": taken, "left_out": by_role}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise VerificationError(f"{uri}: the accounting cannot be checked: {error!r}") from error
    if stated != found:
        raise VerificationError(f"{uri}: the accounting states {stated}, the manifest's rows come to {found}")


def _verify_output(
    place: Place,
    output: Mapping[str, Any],
    rows: list[dict[str, Any]],
    level: str,
    progress: Callable[[int], None] | None,
) -> tuple[list[Issue], dict[str, Any] | None]:
    """The issues of one file, and what is there where that is not what the manifest says."""
    uri = place.uri
    try:
        reader = place.open_reader()
    except NotFoundInStoreError:
        return [Issue("missing_output", uri, "the manifest names this file, and it is not there")], None
    with reader:
        there = ObjectStat(uri, reader.size, reader.identity)
        if reader.size != output["size"]:
            detail = f"{reader.size} bytes, the manifest says {output['size']}"
            return [Issue("size_mismatch", uri, detail)], damaged_file(there, None)
        if level == "none":
            return [], None
        difference = difference_of(reader, output, rows, progress)
        if not difference:
            return [], None
        # Read once more, only where damage was found: the SHA-256 of its present content identifies the file.
        found = digest_file(reader, [], [], progress).sha256
    return [Issue("checksum_mismatch", uri, difference)], damaged_file(there, found)


def difference_of(
    reader: RangeReader,
    output: Mapping[str, Any],
    rows: Iterable[Mapping[str, Any]],
    progress: Callable[[int], None] | None = None,
) -> str:
    """How a file differs from what a manifest states of it and of its tensors; empty where it does not.

    Hashes what there are digests of, and reads all of it once.

    Args:
        output: the manifest's row of the file. rows: those of the tensors in it.
    """
    sha256, gaps, crc32 = (output.get(key) for key in ("sha256", "gaps_sha256", "crc32"))
    serial: Serial = "file" if sha256 is not None else "gaps" if gaps is not None else "nothing"
    # Between tensors is what is in none of them, whether they have a digest or not.
    places = [(row, stored_tensor(row)) for row in rows if gaps is not None or row.get("sha256") is not None]
    digests = digest_file(reader, [], [place for _, place in places], progress, serial=serial)
    stated = {"SHA-256": sha256, "SHA-256 between tensors": gaps if sha256 is None else None, "CRC-32": crc32}
    found = {
        "SHA-256": digests.sha256,
        "SHA-256 between tensors": digests.gaps_sha256,
        "CRC-32": hex_crc32(digests.crc32),
    }
    wrong = [kind for kind, digest in stated.items() if digest is not None and digest != found[kind]]
    hit = [row["name"] for row, place in places if row.get("sha256") not in (None, digests.tensors[place])]
    if not wrong and not hit:
        return ""
    what = f"tensors {', '.join(hit[:5])}" if hit else "no tensor, but the file around them"
    if not wrong:
        return f"its own digests are right, those of its tensors are not; hit: {what}"
    return f"found {wrong[0]} {found[wrong[0]]}, expected {stated[wrong[0]]}; hit: {what}"


def _verify_statement(output: Place, manifest: dict[str, Any]) -> Iterable[Issue]:
    """The statement next to the output says what the manifest says, all of it and nothing else."""
    place = output.beside(STATEMENT_SUFFIX)
    uri = place.uri
    try:
        stated = json.loads(place.read_bytes(limit=MAX_STATEMENT_NBYTES))
        wanted = statement_of(manifest)
    except NotFoundInStoreError:
        return [Issue("provenance_missing", uri, "the manifest names this statement, and it is not there")]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, LimitExceededError) as error:
        return [Issue("provenance_mismatch", uri, f"no statement of this manifest: {error!r}")]
    if stated != wanted:
        return [Issue("provenance_mismatch", uri, "the statement says something else than the manifest")]
    return []


def _verify_by_loading(output: Place, manifest: dict[str, Any]) -> Iterable[Issue]:
    from ptbin.proof.load import open_output, rows_by_state_dict
    from ptbin.proof.loaded import iter_loaded_tensors

    for rows in rows_by_state_dict(manifest):
        try:
            with open_output(output, {**manifest, "tensors": rows}) as loaded:
                found = {
                    n: (str(t.dtype).removeprefix("torch."), list(t.shape))
                    for n, t in iter_loaded_tensors(loaded)
                }
        except StorageError:
            raise
        except VerificationError as error:
            return [Issue("load_failed", output.uri, str(error))]
        if found != {row["name"]: (row["dtype"], row["shape"]) for row in rows}:
            detail = "torch loads other tensors than the manifest lists"
            return [Issue("load_failed", output.uri, detail)]
    return []
