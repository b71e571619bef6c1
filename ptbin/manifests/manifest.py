"""The manifest: what one output is, where it came from, and how it was proven. Pure data.

It lies next to the output (`<output>.manifest.json`), is written last and is the commit marker: an
output without one does not count. Paths in it are relative to it, so that a folder can be moved. A
consumer can check every tensor from its logical, contiguous bytes, in any output format.

The schema is published as `ptbin/manifest.schema.json`; `SCHEMA_VERSION` changes with its meaning.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from ptbin.errors import VerificationError
from ptbin.values.names import bad_name, is_plain_name

SCHEMA_VERSION = 1
MAX_NAME_NBYTES = 1024
"""Of a key in S3; file systems hold less, and say so themselves."""
MANIFEST_SUFFIX = ".manifest.json"
ROWS_AT_ONCE = 1000

_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "schema_version": int,
    "source": dict,
    "selected": str,
    "options": dict,
    "options_fingerprint": str,
    "outputs": list,
    "tensors": list,
    "left_out": list,
    "globals": list,
    "safety": dict,
    "verification": dict,
    "tool": dict,
}


def manifest_uri(output_uri: str) -> str:
    """Where the manifest of an output lies."""
    return output_uri + MANIFEST_SUFFIX


def utc_now() -> str:
    """Now, as ISO 8601 in UTC with whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def rows_by_file(rows: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """A manifest's rows of tensors by the file they lie in, each in their order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["file"], []).append(row)
    return found


def hex_crc32(value: int) -> str:
    """Eight hexadecimal digits, as manifests write a CRC-32."""
    return f"{value:08x}"


def dump_manifest(manifest: Mapping[str, Any]) -> bytes:
    """The manifest as it is stored: UTF-8 JSON, one tensor a line."""
    out = [b"{\n"]
    encode = json.JSONEncoder(ensure_ascii=False).encode
    for number, (key, value) in enumerate(manifest.items()):
        out.append(b",\n" * (number > 0) + f"  {json.dumps(key)}: ".encode())
        if isinstance(value, list) and value and isinstance(value[0], dict):
            out.append(b"[\n")
            for start in range(0, len(value), ROWS_AT_ONCE):
                rows = ",\n".join(["    " + encode(row) for row in value[start : start + ROWS_AT_ONCE]])
                # backslashreplace, because tensor names come out of foreign pickles
                out.append(b",\n" * (start > 0) + rows.encode("utf-8", "backslashreplace"))
            out.append(b"\n  ]")
        else:
            out.append(encode(value).encode("utf-8", "backslashreplace"))
    out.append(b"\n}\n")
    return b"".join(out)


def parse_manifest(data: bytes, uri: str) -> dict[str, Any]:
    """A stored manifest, its shape checked.

    Raises:
        VerificationError: no JSON, another schema version, or parts missing.
    """
    try:
        manifest = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise VerificationError(f"{uri}: the manifest is not JSON: {error}") from error
    if not isinstance(manifest, dict):
        raise VerificationError(f"{uri}: the manifest is not a JSON object")
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise VerificationError(
            f"{uri}: manifest of schema version {manifest.get('schema_version')!r}, expected {SCHEMA_VERSION}"
        )
    for key, kind in _REQUIRED.items():
        if not isinstance(manifest.get(key), kind):
            raise VerificationError(f"{uri}: the manifest lacks {key!r}, or it has the wrong type")
    for output in manifest["outputs"]:
        path = output.get("path") if isinstance(output, dict) else None
        if not isinstance(path, str) or not path or not isinstance(output.get("size"), int):
            raise VerificationError(f"{uri}: the manifest names an output without path or size")
        if bad_name(path) or len(path.encode("utf-8", "replace")) > MAX_NAME_NBYTES:
            raise VerificationError(
                f"{uri}: the manifest names an output with a text that is not a file name"
            )
        if not is_plain_name(path):
            raise VerificationError(f"{uri}: the manifest names {path!r}, which lies outside its folder")
    return manifest
