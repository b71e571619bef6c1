"""Signatures of OpenSSF model-signing, checked in any store: `model.sig` signs the folder that it lies in.

The library reads signature and key and compares; only the digests come from here, because it can list and
read nothing but local folders. Signatures are made by its own tool (docs/provenance.md).
"""

from __future__ import annotations

import hashlib
import importlib
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from ptbin.errors import UsageError
from ptbin.proof.verification import Issue
from ptbin.stores import Place, WatchQuietly

SIGNATURE = "model.sig"
MAX_NBYTES = 256 << 20
CHUNK_NBYTES = 1 << 20
_DIGESTS = re.compile(r": Expected 'Digest\(.*?\)', Actual 'Digest\(.*?\)'")
GIT_FILES = (".git", ".gitattributes", ".github", ".gitignore")
"""What the library's tool leaves out of a signature unless told otherwise."""


def verify_signatures(
    dest: Place, public_key: str, manifests: Iterable[str], *, progress: Callable[[int], None] | None = None
) -> list[Issue]:
    """Check every signature at or below DEST with one public key; reads all that is signed.

    Args:
        public_key: path of a PEM file with an elliptic-curve key.
        manifests: URIs of the manifests below DEST, each of which must lie in a folder that is signed.

    Raises:
        UsageError: no such key, or the library is not installed.
    """
    if not Path(public_key).is_file():
        raise UsageError(f"{public_key}: no such public key")
    root = dest.file
    if not root.is_directory():
        root = root.parent
    found = [
        root / item.path
        for item in root.iter_objects(WatchQuietly())
        if PurePosixPath(item.path).name == SIGNATURE
    ]
    issues = []
    signed = []
    for place in found:
        problem = _verify_folder(place.parent, public_key, progress)
        if problem is not None:
            issues.append(Issue("bad_signature", place.uri, problem))
        signed.append(place.parent.uri + "/")
    issues += [
        Issue("not_signed", uri, f"no {SIGNATURE} in its folder or above it")
        for uri in manifests
        if not uri.startswith(tuple(signed))
    ]
    return issues


def _verify_folder(folder: Place, public_key: str, progress: Callable[[int], None] | None) -> str | None:
    """What is wrong with one signed folder."""
    try:
        verifying: Any = importlib.import_module("model_signing.verifying")
    except ImportError as error:
        raise UsageError(
            "model-signing is not installed, which checks signatures: pip install 'ptbin[signing]'"
        ) from error
    with tempfile.TemporaryDirectory(prefix="ptbin-") as scratch:
        local = Path(scratch) / SIGNATURE
        local.write_bytes((folder / SIGNATURE).read_bytes(limit=MAX_NBYTES))
        hashing = _StoreHashing(folder, progress)
        config = verifying.Config().use_elliptic_key_verifier(public_key=public_key)
        try:
            config.set_hashing_config(hashing).verify(Path(folder.path), local)
        except Exception as error:  # noqa: BLE001 - a forged signature fails in many ways, all of them this
            text = _DIGESTS.sub("", f"{type(error).__name__}: {error}")
            return " ".join(text.split())[:500]
    return None


class _StoreHashing:
    """Stands where the library has its own hashing of local folders."""

    def __init__(self, folder: Place, progress: Callable[[int], None] | None) -> None:
        self._folder = folder
        self._progress = progress
        self._ignored: set[str] = {SIGNATURE, *GIT_FILES}

    def add_ignored_paths(self, *, model_path: Any, paths: Iterable[Any]) -> None:
        """Refuse a signature that leaves other files out than itself and those of Git."""
        del model_path
        for path in paths:
            if PurePosixPath(path).name not in (SIGNATURE, *GIT_FILES):
                raise ValueError(f"the signature leaves {path} out")

    def hash(self, model_path: Any, *, files_to_hash: Any = None) -> Any:
        manifest: Any = importlib.import_module("model_signing.manifest")
        del files_to_hash
        items = []
        for listed in self._folder.iter_objects():
            if listed.path.split("/")[0] in self._ignored:
                continue
            digest = hashlib.sha256()
            with (self._folder / listed.path).open_reader() as reader:
                for piece in reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES):
                    digest.update(piece)
                    if self._progress is not None:
                        self._progress(0)
            items.append(
                manifest.FileManifestItem(
                    path=PurePosixPath(listed.path), digest=manifest.hashing.Digest("sha256", digest.digest())
                )
            )
        kind = manifest.SerializationType.from_args(
            {"method": "files", "hash_type": "sha256", "allow_symlinks": False, "ignore_paths": []}
        )
        return manifest.Manifest(PurePosixPath(str(model_path)).name, items, kind)
