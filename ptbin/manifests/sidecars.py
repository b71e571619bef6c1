"""Small files next to an output, a model's configuration say: written under its manifest's guard."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping

from ptbin.manifests.draft import DraftFile
from ptbin.manifests.vouching import OutputSite
from ptbin.sources.opening import SourcePlace
from ptbin.sources.sidecars import with_dtype
from ptbin.stores import ListedObject, identity_text
from ptbin.values.crc32 import crc32_of

MAX_CONFIG_NBYTES = 16 << 20
CHUNK_NBYTES = 1 << 20


def copy_sidecars(
    found: Mapping[str, ListedObject],
    source: SourcePlace,
    at: OutputSite,
    *,
    dtype: str | None,
    notes: list[str],
) -> Iterator[DraftFile]:
    """Copy them from the source's folder to the output's.

    They go along as they are, but for `config.json` where weights are cast to `dtype`: it says so then.

    Args:
        notes: for the manifest; what was changed is added.

    Raises:
        OutputExistsError: another file is at the place of one.
    """
    for name, item in found.items():
        if name == "config.json" and dtype is not None:
            data = (source.folder / item.path).read_bytes(limit=MAX_CONFIG_NBYTES)
            data, note = with_dtype(data, dtype)
            notes += [note] if note else []
            yield put_text(at, name, data)
            continue
        with (source.folder / item.path).open_reader() as reader:
            pieces = reader.iter_range(0, reader.size, chunk_nbytes=CHUNK_NBYTES)
            yield _put(at, name, reader.size, pieces, reader.check_unchanged)


def put_text(at: OutputSite, name: str, data: bytes) -> DraftFile:
    """Write a small file next to an output. Raises OutputExistsError as `OutputSite.check`."""
    return _put(at, name, len(data), (data,), lambda: None)


def _put(
    at: OutputSite, name: str, size: int, pieces: Iterable[bytes], confirm: Callable[[], None]
) -> DraftFile:
    crc, sha256 = 0, hashlib.sha256()
    with at.place_of(name).open_writer(size_hint=size, claim=at.claim) as writer:
        for piece in pieces:
            crc = crc32_of(piece, crc)
            sha256.update(piece)
            writer.write(piece)
        confirm()
        at.check(name, size, crc)
        at.withdraw_manifest((name, size, crc))
        writer.commit()
    return DraftFile(
        name,
        size,
        crc,
        sha256=sha256.hexdigest() if writer.acknowledged else None,
        identity=identity_text(writer.identity) or None,
        acknowledged=writer.acknowledged,
    )
