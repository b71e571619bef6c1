"""Where an output comes from, in a form that others can check: an in-toto statement with SLSA provenance.

It says nothing that the manifest does not say: `statement_of` makes it of a manifest, so that a reader who
has both can compare them. Subjects are the output's files; the resolved dependencies are the source's, with
the SHA-256 of each as it was read, its size, and what its store told it apart by (ETag, version id, time). Of
a file whose SHA-256 was not asked for (`--file-digest none`) the subjects are its tensors.

https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md, https://slsa.dev/spec/v1.0/provenance
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections.abc import Callable, Mapping
from typing import Any

from ptbin.sources.opening import SourcePlace
from ptbin.stores import RangeReader

STATEMENT_SUFFIX = ".intoto.json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:ptbin:conversion:v1"
"""What the parameters mean: docs/provenance.md."""

CHUNK_NBYTES = 1 << 20


def add_source_digests(
    source: dict[str, Any], place: SourcePlace, reader: RangeReader, progress: Callable[[int], None] | None
) -> None:
    """Read the whole source and put the SHA-256 of each of its files into a manifest's `source`."""
    if not place.parts:
        source["sha256"] = _digest(reader, progress)
        return
    for part, row in zip(place.parts, source["files"], strict=True):
        with (place.folder / part.path).open_reader(expected=part.identity) as file:
            row["sha256"] = _digest(file, progress)


def _digest(reader: RangeReader, progress: Callable[[int], None] | None) -> str:
    digest = hashlib.sha256()
    for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
        digest.update(piece)
        if progress is not None:
            progress(0)
    reader.check_unchanged()
    return digest.hexdigest()


def statement_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The in-toto Statement v1 of an output, as JSON-able values.

    Raises:
        KeyError: the manifest holds no digests of its source or outputs: it was made without provenance.
    """
    source = manifest["source"]
    parameters: dict[str, Any] = {"source": source["uri"], "selected": manifest["selected"]}
    parameters |= {"options": dict(manifest["options"])}
    if (registry := manifest.get("registry")) is not None:
        parameters["registry"] = dict(registry["origin"])
    return {
        "_type": STATEMENT_TYPE,
        "subject": [subject for output in manifest["outputs"] for subject in _subjects(output, manifest)],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": parameters,
                "internalParameters": {"verification": manifest["verification"]["level"]},
                "resolvedDependencies": _dependencies(source),
            },
            "runDetails": {
                "builder": {
                    "id": f"pkg:pypi/{manifest['tool']['name']}",
                    "version": {manifest["tool"]["name"]: manifest["tool"]["version"]},
                },
                "metadata": {
                    "invocationId": manifest["run_id"],
                    "startedOn": manifest["started_at"],
                    "finishedOn": manifest["finished_at"],
                },
            },
        },
    }


def _subjects(output: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The file, or where its SHA-256 was not asked for, each tensor in it as `file#name`."""
    if output.get("sha256") is not None or output.get("gaps_sha256") is None:
        return [{"name": output["path"], "digest": {"sha256": _required(output, "sha256")}}]
    return [
        {"name": f"{output['path']}#{row['name']}", "digest": {"sha256": _required(row, "sha256")}}
        for row in manifest["tensors"]
        if row["file"] == output["path"]
    ]


def _dependencies(source: Mapping[str, Any]) -> list[dict[str, Any]]:
    files = source.get("files")
    if not files:
        return [_dependency(source["uri"], source)]
    # The URI is of the folder, or of the index file in it.
    names = {row["path"] for row in files}
    folder, _, name = source["uri"].rstrip("/").rpartition("/")
    base = folder if name in names else source["uri"]
    return [_dependency(posixpath.join(base, row["path"]), row) for row in files]


def _dependency(uri: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    annotations: dict[str, Any] = {"size": facts["size"]}
    if identity := facts.get("identity"):
        annotations[identity["kind"]] = identity["value"]
    return {"uri": uri, "digest": {"sha256": _required(facts, "sha256")}, "annotations": annotations}


def _required(facts: Mapping[str, Any], key: str) -> Any:
    if facts.get(key) is None:
        raise KeyError(key)
    return facts[key]


def dump_statement(statement: Mapping[str, Any]) -> bytes:
    """As it is stored."""
    return (json.dumps(statement, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
