"""Lines of a run's `SHA256SUMS`: as GNU `sha256sum` writes and reads them, paths relative to DEST.

A file without a SHA-256 of its own (`--file-digest none`) has a comment for each of its tensors instead, `#
<digest>  <file>#<tensor>`, which `sha256sum -c` passes over.
"""

from __future__ import annotations

from collections.abc import Iterable

from ptbin.errors import NotFoundInStoreError, VerificationError
from ptbin.manifests.manifest import parse_manifest
from ptbin.stores import Place

CHECKSUM_LIST = "SHA256SUMS"


def checksum_line(path: str, digest: str) -> str:
    # coreutils escapes a name that would break the line, and says so with a backslash before the digest
    # (GNU coreutils manual, "md5sum invocation").
    escaped = _escaped(path)
    marker = "" if escaped == path else "\\"
    return f"{marker}{digest}  {escaped}\n"


def tensor_lines(manifests: Iterable[Place], dest: Place) -> str:
    """For the outputs of these manifests below `dest` that have no SHA-256: a line for each tensor.

    Reads each manifest.

    Raises:
        StorageError: the store failed.
    """
    lines = []
    for place in sorted(manifests, key=lambda place: place.path):
        try:
            manifest = parse_manifest(place.read_bytes(), place.uri)
        except (NotFoundInStoreError, VerificationError):  # replaced meanwhile, by another run
            continue
        folder = place.parent.relative_to(dest) if place.parent != dest.file else ""
        without = {output["path"] for output in manifest["outputs"] if output.get("sha256") is None}
        for row in manifest["tensors"]:
            if row["file"] in without and row["sha256"] is not None:
                name = f"{folder}/{row['file']}" if folder else row["file"]
                lines.append(f"# {row['sha256']}  {_escaped(name)}#{_escaped(row['name'])}\n")
    return "".join(lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
