"""`.bin` back to `.pt`: a state dict by a splice, or a model by the caller's code in separate processes.

Without a model the output is a state dict, a splice as any other, and torch takes no part. With one, `models`
has it built and proven. Nothing appears at DEST before that, and nothing there is replaced that a manifest
does not vouch for as restored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ptbin.conversion import Progress, publish_at, stage
from ptbin.errors import UsageError
from ptbin.manifests.manifest import MANIFEST_SUFFIX
from ptbin.manifests.vouching import OutputSite, Standing
from ptbin.options import given
from ptbin.preparing import Preview, preview
from ptbin.restoring.models import restore_model
from ptbin.restoring.options import RestoreOptions
from ptbin.stores import Place, place_of
from ptbin.stores.place import Where


def restore(
    source: Where,
    dest: Where,
    options: RestoreOptions | None = None,
    *,
    source_options: Mapping[str, Any] | None = None,
    dest_options: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
    standing: Standing | None = None,
) -> dict[str, Any]:
    """Restore one set of weights and return the manifest of the restored file.

    Args:
        source: `.bin` of format torch or raw, safetensors, an index of shards, or a folder.
        dest: the `.pt`; its manifest goes next to it.
        standing: what a listing has shown at `dest`; spares requests.

    Raises:
        OutputExistsError: a file is there that no manifest of `restore` vouches for, without `options.force`.
        ModelMismatchError: keys are missing, unexpected or of another shape; nothing was written.
        CheckpointError, VerificationError, StorageError, UsageError: as `ptbin.convert`.
    """
    options = given(options, RestoreOptions)
    source, dest = place_of(source, source_options), place_of(dest, dest_options)
    if dest.name.lower().endswith(".safetensors"):
        raise UsageError(f"{dest.uri}: restore makes files for torch; ptbin convert makes .safetensors")
    if options.model is None:
        draft = stage(
            source,
            dest,
            options.conversion(),
            run_id=run_id,
            progress=progress,
            guard="restored",
            standing=standing,
        )
        draft.manifest["options"]["restore"] = options.to_json()
        return publish_at(draft, source, dest, progress).manifest
    at = _site_of(source, dest, options, standing)
    at.check_vouched()
    return restore_model(source, at, options, run_id=run_id, progress=progress)


def preview_restore(
    source: Place, dest: Place, options: RestoreOptions, *, standing: Standing | None = None
) -> Preview:
    """What `restore` would do, found as it finds it. Writes nothing.

    Raises:
        OutputExistsError: it would refuse to. CheckpointError: it would refuse the source.
    """
    if options.model is None:
        return preview(source, dest, options.conversion(), guard="restored", standing=standing)
    at = _site_of(source, dest, options, standing)
    at.check_vouched()
    return Preview((dest.name, dest.name + MANIFEST_SUFFIX), tuple(sorted(at.replaced)))


def _site_of(source: Place, dest: Place, options: RestoreOptions, standing: Standing | None) -> OutputSite:
    return OutputSite(
        dest, None if options.force else "restored", standing=standing, restores=True, source_uri=source.uri
    )
